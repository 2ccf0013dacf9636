"""The pool: results of all ranks, reuse, seeds, placement; one start serves many cases."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_functions as functions
import torch

from moeproof.harness.ranks import RankPool, rank_seed
from moeproof.harness.ranks.transport import TRANSPORTS, place, unavailable
from moeproof.reference.contract.errors import ContractError


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def test_every_rank_runs_and_answers(pool: RankPool) -> None:
    run = pool.run(functions.total, 3.0)

    assert run.ok, run
    assert run.results == (7.0, 7.0)
    assert run.reason == ""


def test_one_start_serves_many_cases(pool: RankPool) -> None:
    pool.warm_up()
    before, starts = pool.pids, pool.starts

    for rows in (0, 1, 5):
        run = pool.run(functions.exchange, rows, 3)
        assert run.ok, run
        assert run.results == (([0.0, 1.0] * bool(rows),) * 2)
    assert (pool.pids, pool.starts) == (before, starts)


@pytest.mark.parametrize("world_size", [1, 3])
def test_other_world_sizes(world_size: int) -> None:
    with RankPool(world_size) as pool:
        run = pool.run(functions.exchange, 2, 4)

    assert run.ok, run
    assert run.results == ([float(r) for r in range(world_size)],) * world_size


def test_seeds_come_from_the_case(pool: RankPool) -> None:
    first, again, other = (pool.run(functions.seeds, seed=s) for s in (7, 7, 8))

    assert first.results == again.results
    assert first.seeds == (rank_seed(7, 0), rank_seed(7, 1)) == tuple(seed for seed, _ in first.results)
    draws = {draw for run in (first, other) for _, draw in run.results}
    assert len(draws) == 4, "no two ranks and no two cases draw alike"


def test_ranks_have_one_thread_and_a_process_group_of_their_own(pool: RankPool) -> None:
    run = pool.run(functions.threads)

    assert run.results == tuple((1, pid) for pid in pool.pids)


def test_tensors_travel_by_value(pool: RankPool) -> None:
    x = torch.arange(6.0).view(2, 3).to(torch.bfloat16)
    run = pool.run(functions.returns, x)
    pool.kill()

    assert all(torch.equal(y, x + rank) for rank, y in enumerate(run.results)), "readable after the ranks are gone"


def test_what_cannot_travel_is_refused(pool: RankPool) -> None:
    with pytest.raises(ContractError, match="top level of an importable module"):
        pool.run(lambda context: 0)
    with Path(__file__).open() as file, pytest.raises(ContractError, match="total and its arguments cannot be sent to ranks"):
        pool.run(functions.total, file)
    assert pool.run(functions.total, 0.0).ok


def test_impossible_pools_are_refused() -> None:
    with pytest.raises(ContractError, match="world_size=0 must be at least 1"):
        RankPool(0)
    with pytest.raises(ContractError, match="deadline=0 must be above 0"):
        RankPool(2, deadline=0)
    with pytest.raises(ContractError, match="transport 'mpi' is not known; allowed: simulated, gloo, symm, nccl"):
        RankPool(2, "mpi")
    with pytest.raises(ContractError, match="simulated ranks are plain functions"):
        RankPool(2, "simulated")


def test_gpu_transports_say_what_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    gpus = 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert "needs an NVIDIA GPU" in str(unavailable("symm", 2))
    assert "2 ranks, 0 GPUs" in str(unavailable("nccl", 2))

    gpus = 1
    assert [place("symm", 2, r).device for r in (0, 1)] == ["cuda:0", "cuda:0"]
    assert place("symm", 2, 0).environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
    assert "2 ranks, 1 GPUs" in str(unavailable("nccl", 2))

    gpus = 4
    assert [place(t, 3, 2).device for t in ("gloo", "symm", "nccl")] == ["cpu", "cuda:2", "cuda:2"]
    assert [place(t, 3, 2).backend for t in ("gloo", "symm", "nccl")] == ["gloo", "gloo", "nccl"]
    assert "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES" not in place("symm", 3, 0).environment
    assert all(unavailable(t, 4) is None for t in TRANSPORTS)


def test_a_rank_that_dies_between_two_cases_does_not_spoil_the_next(pool: RankPool) -> None:
    pool.warm_up()
    os.kill(pool.pids[1], signal.SIGKILL)
    pool._members[1].process.join(10)
    run = pool.run(functions.total, 1.0)

    assert run.ok, run
    assert run.note == "rank 1 killed by SIGKILL between two cases; new ranks were started"
