"""Hangs, deaths and exceptions: in time, with the rank, its stage, its last collective and its stack; the next case passes."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import rank_functions as functions

from moeproof.harness.ranks import Ending, RankPool, RankRun

DEADLINE = 1.5
MARGIN = 2.0
"""Seconds after the deadline in which every run must have ended."""


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, deadline=DEADLINE) as pool:
        yield pool


def run(pool: RankPool, function: object, *arguments: object) -> RankRun:
    """Run it, within deadline and margin; whatever came of it, the next case must pass."""
    pool.warm_up()
    start = time.monotonic()
    result = pool.run(function, *arguments)  # type: ignore[arg-type]
    seconds = time.monotonic() - start
    after = pool.run(functions.total, 1.0)

    assert seconds < DEADLINE + MARGIN
    assert after.ok and after.results == (3.0, 3.0), after
    return result


def test_a_rank_that_skips_a_collective_is_named_before_the_deadline(pool: RankPool) -> None:
    result = run(pool, functions.skips, 1)

    assert (result.ending, result.rank) == (Ending.HUNG, 1)
    assert result.seconds < DEADLINE, "the journals prove it"
    assert "nothing moves, and the ranks call different collectives; look at rank 1 in stage COMBINE" in result.reason
    (mismatch,) = result.mismatches
    assert (mismatch.rank, mismatch.index, mismatch.entry) == (1, 1, None)
    assert mismatch.other_entry is not None and str(mismatch.other_entry).startswith("#1 all_reduce float32 (4,)")


def test_a_rank_that_stalls_is_named_at_the_deadline(pool: RankPool) -> None:
    result = run(pool, functions.stalls, 0)
    stalled, waiting = result.states

    assert (result.ending, result.rank) == (Ending.HUNG, 0)
    assert result.seconds >= DEADLINE
    assert (stalled.stage, waiting.stage) == ("GEMM1", "GEMM1")
    assert stalled.last is not None and stalled.last.index == 0 and stalled.last.finished
    assert waiting.last is not None and waiting.last.index == 1 and not waiting.last.finished
    assert stalled.stack[-1].endswith("in stalls: time.sleep(3600)")
    assert any("in stalls: dist.all_reduce(torch.ones(4, " in frame for frame in waiting.stack)
    assert "last collective #0 all_reduce float32 (4,) sum among ranks 0,1 at rank_functions.py:" in str(stalled)
    assert "inside collective #1 all_reduce float32 (4,) sum among ranks 0,1" in str(waiting)


def test_a_rank_that_never_gives_the_interpreter_up_still_shows_its_stack(pool: RankPool) -> None:
    result = run(pool, functions.spins, 1)

    assert (result.ending, result.rank) == (Ending.HUNG, 1)
    assert result.states[1].stack == (result.states[1].stack[0],)
    assert result.states[1].stack[0].endswith("in spins: sum(range(10**15))")


def test_wrong_order_shows_both_calls(pool: RankPool) -> None:
    result = run(pool, functions.wrong_order)

    assert result.ending is Ending.HUNG
    (mismatch,) = result.mismatches
    assert mismatch.what == "another operation, broadcast against all_reduce"
    assert "rank 1: #0 broadcast float32 (4,) root 0" in str(mismatch)
    assert "rank 0: #0 all_reduce float32 (4,) sum" in str(mismatch)


@pytest.mark.parametrize(
    ("function", "what"),
    [(functions.other_sizes, "other sizes"), (functions.other_dtype, "another dtype, float32 against float64")],
)
def test_other_sizes_and_dtypes_are_told_however_gloo_takes_them(pool: RankPool, function: object, what: str) -> None:
    """gloo lets one rank return and aborts or blocks the other, as it happens."""
    result = run(pool, function)

    assert result.ending in (Ending.HUNG, Ending.DIED, Ending.RAISED)
    assert [m.what for m in result.mismatches] == [what]
    assert result.mismatches[0].rank == 1


def test_a_short_exchange_is_told_although_gloo_says_nothing(pool: RankPool) -> None:
    result = run(pool, functions.sends_less, 1)

    assert (result.ending, result.rank) == (Ending.MISMATCH, 0)
    assert "rank 0 sends 1 rows to rank 1, which expects 2" in result.reason


def test_a_long_exchange_that_kills_its_receiver_names_the_sender(pool: RankPool) -> None:
    result = run(pool, functions.sends_less, -1)

    assert (result.ending, result.rank) == (Ending.DIED, 0)
    assert "rank 1 died: killed by SIGABRT" in result.headline
    assert "rank 0 sends 3 rows to rank 1, which expects 2" in result.reason
    assert any("gloo::EnforceNotMet" in line for line in result.states[1].output)


def test_another_reduction_is_told_although_nothing_hangs(pool: RankPool) -> None:
    result = run(pool, functions.reduces_otherwise)

    assert (result.ending, result.rank) == (Ending.MISMATCH, 1)
    assert result.mismatches[0].what == "'sum' against 'max'"


def test_an_exception_releases_the_others(pool: RankPool) -> None:
    result = run(pool, functions.raises, 1)

    assert (result.ending, result.rank) == (Ending.RAISED, 1)
    assert result.seconds < DEADLINE
    assert result.headline == "rank 1 raised in stage PERMUTE: IndexError: expert 9 of 8"
    assert result.states[1].stack[-1].endswith('in raises: raise IndexError("expert 9 of 8")')


def test_an_exception_on_all_ranks_keeps_the_pool(pool: RankPool) -> None:
    pool.warm_up()
    before = pool.pids
    result = run(pool, functions.all_raise)

    assert result.ending is Ending.RAISED
    assert [s.state for s in result.states] == [f"raised ValueError: no such scheme on rank {r}" for r in (0, 1)]
    assert pool.pids == before


def test_a_refusal_names_the_rank_that_refused(pool: RankPool) -> None:
    """Every rank raises; the first to do so may be one that only repeats what it was told."""
    result = run(pool, functions.refuses, 1)

    assert (result.ending, result.rank, result.refused) == (Ending.RAISED, 1, True)
    assert result.headline.startswith("rank 1 refused its arguments, after collective #0 all_gather_object")
    assert result.headline.endswith(": ContractError: 5 tokens on this rank, at most 4 are allowed")


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("SIGKILL", "killed by SIGKILL"),
        ("SIGSEGV", "killed by SIGSEGV"),
        ("exit", "exited with code 3"),
    ],
)
def test_a_dead_rank_names_itself(pool: RankPool, how: str, words: str) -> None:
    result = run(pool, functions.dies, 1, how)

    assert (result.ending, result.rank) == (Ending.DIED, 1)
    assert result.seconds < DEADLINE
    assert result.headline.startswith(f"rank 1 died: {words} in stage DISPATCH, inside collective #1 put float32 (2, 3)")
    if how == "SIGSEGV":
        assert "in dies: os.kill" in result.states[1].stack[-1]


def test_a_stopped_rank_is_named_with_the_kernels_word(pool: RankPool) -> None:
    result = run(pool, functions.stops, 1)

    assert (result.ending, result.rank) == (Ending.HUNG, 1)
    assert result.states[1].stack == ("no Python stack; the kernel calls it T (stopped)",)


def test_a_pool_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    pool = RankPool(2)
    pool.placements[1] = replace(pool.placements[1], backend="carrier-pigeon")
    monkeypatch.setattr("moeproof.harness.ranks.pool.START_DEADLINE", 20.0)
    result = pool.run(functions.total, 1.0)

    assert (result.ending, result.rank) == (Ending.RAISED, 1)
    assert "carrier-pigeon" in result.headline
    assert pool.pids == []
