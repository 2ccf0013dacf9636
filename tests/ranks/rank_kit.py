"""What the tests of ranks share: pairs, cases by name, simulated runs, verdicts as findings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.worlds import make_world_inputs, whole_case
from moeproof.harness.ranks.checks import WorldExpectation, judge_world
from moeproof.harness.ranks.pairs import run_rank, support
from moeproof.harness.registry import find_rank_pairs
from moeproof.reference.contract import FusedMoEModularKernel, Inputs, Link, RankPair
from moeproof.reference.eager.ranks_link import on_threads

Shown = dict[str, torch.Tensor]
INSTALLED = {pair.name: pair for pair in find_rank_pairs()}
PAIRS = {name: pair for name, pair in INSTALLED.items() if pair.backend == "torch"}
SHOWING = [name for name, pair in PAIRS.items() if pair.kernel is FusedMoEModularKernel]
"""Pairs whose rows can be seen: those that are called in one piece."""
every_pair = pytest.mark.parametrize("name", PAIRS)
every_showing = pytest.mark.parametrize("name", SHOWING)
every_ranks = pytest.mark.parametrize("ranks", [1, 2, 3, 4])
SIZES = "T=9,H=20,I=13,E=7,K=3"
ROUTINGS = {
    "uniform": "routing=uniform",
    "hot": "routing=hot",
    "minus1": "routing=minus1",
    "dup": "routing=dup",
    "none": "routing=none",
    "empty rank": "routing=uniform,spread=empty",
    "one rank": "routing=minus1,spread=one",
    "uneven": "routing=dup,spread=uneven",
    "no token anywhere": "T=0",
}
"""Reasons, and what they add to a line."""


def line_for(name: str, ranks: int, *extras: str, sizes: str = SIZES) -> str:
    """A case line for the pair: its layout, so many ranks, later keys over earlier ones."""
    options = {"layout": INSTALLED[name].layout, "values": "sat", "ranks": str(ranks), "seed": "5"}
    for extra in (sizes, *extras):
        options |= dict(part.split("=", 1) for part in extra.split(",") if part)
    if ranks == 1:
        options = {key: value for key, value in options.items() if key not in ("spread", "redundant", "tp", "sp")}
    return str(parse_case(",".join(f"{key}={value}" for key, value in options.items())))


@cache
def expectation(line: str, name: str) -> WorldExpectation:
    case = parse_case(line)
    pair = INSTALLED[name]
    return WorldExpectation(case.world, make_inputs(whole_case(case)), pair.claims, pair.quant1)


def on_ranks(ranks: int, body: Callable[[Link], Any], timeout: float = 10.0) -> list[Any]:
    """body on simulated ranks; the first exception that is not an echo of another's is raised."""
    results = on_threads(ranks, body, timeout)
    errors = [r for r in results if isinstance(r, Exception)]
    for error in sorted(errors, key=lambda e: type(e).__name__ == "BrokenBarrierError"):
        raise error
    return results


def simulate(pair: RankPair, case: Case, calls: Sequence[Sequence[Inputs]] = ()) -> list[list[Shown]]:
    """What every rank showed in every call: [call][rank]. `calls` are lists of all ranks' inputs; the case's own by default."""
    assert support(pair, case.world, "simulated") is None
    calls = calls or [make_world_inputs(case)]
    results = on_ranks(case.ranks, lambda link: run_rank(pair, [call[link.rank] for call in calls], case.world, link))
    return [[rank[n] for rank in results] for n in range(len(calls))]


def findings(expect: WorldExpectation, shown: Sequence[Shown]) -> list[str]:
    return [str(f) for judged in judge_world(expect, shown).values() for f in judged.findings]
