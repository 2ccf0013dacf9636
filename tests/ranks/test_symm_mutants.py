"""Planted faults of the one-sided exchange are caught, and their neutral twins pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rank_kit import expectation, findings, line_for
from symm_mutants import BY_NAME, mutated

from moeproof.harness.ranks import RankPool

NAME = "symm-standard"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, deadline=60.0) as pool:
        yield pool


def words(pool: RankPool, name: str, twin: bool) -> list[str]:
    """Whatever two ranks and the judge have to say of a mutant's calls."""
    lines = [line_for(NAME, 2, extra) for extra in BY_NAME[name].calls]
    run = pool.run(mutated, NAME, name, twin, lines)
    assert run.ok, run
    said = [text for text, _ in run.results if text]
    for number in range(min(len(shown) for _, shown in run.results)):
        said += findings(expectation(lines[number], NAME), [shown[number] for _, shown in run.results])
    return said


@pytest.mark.parametrize("name", BY_NAME)
def test_a_fault_of_the_exchange_is_caught(pool: RankPool, name: str) -> None:
    found = words(pool, name, twin=False)

    assert any(BY_NAME[name].caught in text for text in found), found


@pytest.mark.parametrize("name", BY_NAME)
def test_the_same_edit_without_the_fault_passes(pool: RankPool, name: str) -> None:
    assert not words(pool, name, twin=True)
