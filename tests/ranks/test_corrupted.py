"""A protocol that one rank does not keep to: every pair ends in a clear error or a finding, never in a hang or in silence.

One rank lies in one collective after the other: counts that are too large or too small, bytes of another row, an old message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_kit import PAIRS, expectation, findings, line_for

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_world_inputs
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import ContractError, Link, RankPair
from moeproof.reference.eager.ranks_link import Missing, on_threads

Tensor = torch.Tensor
RANKS = 3


def more(x: Tensor, _: Tensor | None) -> Tensor:
    return x + 1


def fewer(x: Tensor, _: Tensor | None) -> Tensor:
    return (x - 1).clamp(min=0)


def torn(x: Tensor, _: Tensor | None) -> Tensor:
    """The second half of the bytes of each row are those of the row before."""
    if x.dim() < 2 or x.size(0) < 2:
        return x
    half = x.clone()
    half[:, x.size(1) // 2 :] = x.roll(1, 0)[:, x.size(1) // 2 :]
    return half


def stale(x: Tensor, before: Tensor | None) -> Tensor:
    """What it brought to the same collective of the call before."""
    return x if before is None or before.shape != x.shape else before


Lie = Callable[[Tensor, Tensor | None], Tensor]
LIES: dict[str, tuple[Lie, Callable[[Tensor], bool]]] = {
    "a count too large": (more, lambda x: x.dtype == torch.int64),
    "a count too small": (fewer, lambda x: x.dtype == torch.int64),
    "torn rows": (torn, lambda x: x.dtype == torch.uint8),
    "an old message": (stale, lambda x: True),
}
"""What is brought instead, and to which collectives."""
HARMLESS = [("eager-allgather", "a count too large"), ("eager-allgather", "a count too small")]
"""Its counts serve for nothing but the longest of them: where that stays long enough the results are right."""


class Liar:
    """A link whose guilty rank brings something else to its `at`-th collective of the second call."""

    def __init__(self, link: Link, guilty: int, lie: str, at: int) -> None:
        self._link, self.guilty, self.at = link, guilty, at
        self._lie, self._wanted = LIES[lie]
        self.seen: list[Tensor] = []
        self.first: list[Tensor] = []
        self.told = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._link, name)
        if not callable(value):
            return value

        def call(x: Tensor, *splits: Sequence[int]) -> Any:
            number = len(self.seen)
            self.seen.append(x.clone())
            if self.first and number == self.at and self._link.rank == self.guilty and self._wanted(x):
                lied = self._lie(x, self.first[number] if number < len(self.first) else None)
                self.told |= not torch.equal(lied, x)
                x = lied
            return value(x, *splits)

        return call

    def next_call(self) -> None:
        self.first, self.seen = self.seen, []


def with_lie(pair: RankPair, lines: Sequence[str], guilty: int, lie: str, at: int) -> tuple[list[Any], bool, int]:
    """(what each rank showed in the second call or raised, whether the lie was one, collectives of that call)."""
    cases = [parse_case(line) for line in lines]
    inputs = [make_world_inputs(case) for case in cases]
    liars: list[Liar] = []

    def body(link: Link) -> Any:
        liar = Liar(link, guilty, lie, at)
        liars.append(liar)

        def prepare_finalize(mine: Any, world: Any, _: Link) -> Any:
            return pair.prepare_finalize(mine, world, liar)  # type: ignore[arg-type]

        planted = replace(pair, prepare_finalize=prepare_finalize)
        for case, call in zip(cases, inputs, strict=True):
            (shown,) = run_rank(planted, [call[link.rank]], case.world, link)
            liar.next_call()
        return shown

    results = on_threads(RANKS, body, 3.0)
    return results, any(liar.told for liar in liars), max(len(liar.first) for liar in liars)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(("guilty", "spread"), [(1, "even"), (2, "one")])
def test_a_lie_ends_in_an_error_or_a_finding(name: str, lie: str, guilty: int, spread: str) -> None:
    lines = [line_for(name, RANKS, f"routing=uniform,spread={spread},seed={seed}") for seed in (5, 6)]
    expect = expectation(lines[1], name)
    hung, unclear, silent, told, at, last = [], [], [], 0, 0, 1
    while at < last:
        results, was_one, last = with_lie(PAIRS[name], lines, guilty, lie, at)
        errors = [r for r in results if isinstance(r, Exception)]
        told += was_one
        if any(isinstance(e, Missing) for e in errors):
            hung.append((at, str(errors[0])))
        elif errors and not any(isinstance(e, ContractError) for e in errors):
            unclear.append((at, repr(errors[0])))
        elif was_one and not errors and not findings(expect, results):
            silent.append(at)
        at += 1

    assert not hung and not unclear, (hung, unclear)
    assert not silent or (name, lie) in HARMLESS, silent
    assert told or lie.startswith("a count") or spread == "one", "no collective carried anything that could be a lie"
