"""The pool's GPU transports: several ranks on one GPU over symmetric memory, one rank per GPU over NCCL."""

from __future__ import annotations

import pytest
import rank_functions as functions
import torch

from moeproof.harness.ranks import Ending, RankPool
from moeproof.harness.ranks.journal import read_journal

GPUS = torch.cuda.device_count()
DEADLINE = 20.0
TRANSPORTS = [
    pytest.param("symm", 2, marks=pytest.mark.skipif(GPUS < 1, reason="needs an NVIDIA GPU"), id="symm-2"),
    pytest.param("symm", 4, marks=pytest.mark.skipif(GPUS < 1, reason="needs an NVIDIA GPU"), id="symm-4"),
    pytest.param("nccl", 2, marks=pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs"), id="nccl-2"),
]


@pytest.mark.parametrize(("transport", "ranks"), TRANSPORTS)
def test_collectives_on_the_device(transport: str, ranks: int) -> None:
    with RankPool(ranks, transport, deadline=DEADLINE) as pool:
        for rows in (0, 1, 5):
            run = pool.run(functions.exchange_on_device, rows)

            assert run.ok, run
            assert run.results == (True,) * ranks
        assert pool.starts == 1


@pytest.mark.parametrize(("transport", "ranks"), TRANSPORTS[:2])
def test_symmetric_memory_carries_a_put(transport: str, ranks: int) -> None:
    with RankPool(ranks, transport, deadline=DEADLINE) as pool:
        run = pool.run(functions.symmetric_put)
        ops = [e.op for e in read_journal(pool._members[0].journal).entries] if run.ok else []

    assert run.ok, run
    assert run.results == tuple(float((r - 1) % ranks) for r in range(ranks))
    assert "symmetric_memory.rendezvous" in ops and "put" in ops


@pytest.mark.parametrize(("transport", "ranks"), TRANSPORTS)
def test_a_busy_gpu_ends_at_the_deadline(transport: str, ranks: int) -> None:
    with RankPool(ranks, transport, deadline=5.0) as pool:
        pool.warm_up()
        run = pool.run(functions.spins_on_device, 1)
        after = pool.run(functions.exchange_on_device, 2, deadline=DEADLINE)

    assert run.ending is Ending.HUNG
    assert run.seconds < 7.0
    assert after.ok, after


@pytest.mark.parametrize(("transport", "ranks"), TRANSPORTS)
@pytest.mark.parametrize("how", ["SIGKILL", "context"])
def test_a_lost_rank_is_named_and_the_next_case_passes(transport: str, ranks: int, how: str) -> None:
    with RankPool(ranks, transport, deadline=DEADLINE) as pool:
        pool.warm_up()
        run = pool.run(functions.illegal_address, 1) if how == "context" else pool.run(functions.dies, 1, how)
        after = pool.run(functions.exchange_on_device, 2)

    assert (run.ending, run.rank) == (Ending.RAISED if how == "context" else Ending.DIED, 1)
    assert after.ok, after
    assert pool.starts == 2
