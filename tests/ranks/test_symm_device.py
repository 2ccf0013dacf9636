"""The one-sided pairs on GPUs: what only a device can show. Contract and soak over every transport: test_transports.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import symm_functions as functions
import torch
from rank_kit import line_for

from moeproof.harness.ranks import RankPool
from moeproof.harness.ranks.transport import unavailable

NAMES = ("symm-standard", "symm-batched")
ROUTINGS = ("uniform", "none", "dup", "minus1", "hot")


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    if reason := unavailable("symm", 2):
        pytest.skip(reason)
    with RankPool(2, "symm", deadline=120.0) as pool:
        yield pool


@pytest.mark.parametrize("name", [*NAMES, "symm-standard-overlapped", "by copies"])
def test_a_graph_replays_with_changed_inputs(pool: RankPool, name: str) -> None:
    lines = [
        line_for(NAMES["batched" in name], 2, f"values=normal,routing={routing},seed={n}") for n, routing in enumerate(ROUTINGS)
    ]
    run = pool.run(functions.replayed, name, lines)

    assert run.ok, run
    assert run.results == ([True] * 11,) * 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["tokens", "map", "experts"])
def test_a_refusing_rank_releases_the_other(pool: RankPool, name: str, fault: str) -> None:
    run = pool.run(functions.refused_then_well, name, line_for(name, 2, "spread=uneven"), fault)

    assert run.ok, run
    (others, first), (own, guilty) = run.results
    assert others[0] == others[2] == own[0] == own[2] == ""
    told = f"RuntimeError in the experts: {own[1]}" if fault == "experts" else own[1]
    assert others[1] == f"rank 1 refused: {told} (this call has no result)"
    assert torch.equal(first[0], first[2]) and torch.equal(guilty[0], guilty[2])


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_stays_away_is_named(pool: RankPool, name: str) -> None:
    run = pool.run(functions.silent, name, line_for(name, 2), 0.5)

    assert run.ok, run
    texts, _ = run.results[0]
    assert texts[0] == ""
    assert texts[1] == "rank 0 waited 0.5 s for the rows (dispatch) of rank 1 in call 2: it is late, stopped or gone"
    assert texts[2] == f"this exchange cannot go on: {texts[1]}"
