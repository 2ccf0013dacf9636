"""Every installed pair on two process ranks over each transport: the contract at every routing, and a soak.

nccl needs two GPUs and symm one; gloo runs everywhere, so that what runs there has run here.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from rank_kit import INSTALLED, ROUTINGS, expectation, line_for

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.worlds import whole_case
from moeproof.harness.ranks import RankContext, RankPool
from moeproof.harness.ranks.call import call, installed, settle
from moeproof.harness.ranks.checks import WorldExpectation, judge_world
from moeproof.harness.ranks.pairs import run_rank, support
from moeproof.harness.ranks.transport import unavailable
from moeproof.reference.contract import Inputs
from moeproof.reference.eager.ranks_link import GroupLink
from moeproof.reference.ranks import rank_inputs

RANKS = 2
DEADLINE = 30.0
ITERATIONS = {"gloo": 40, "symm": 200, "nccl": 200}
SOAK = ("uniform", "hot_first", "minus1", "dup", "none", "zipf", "trailing", "hot_last", "uniform")
"""Routing of each call of the soak; with `trailing` the second rank's tokens go nowhere."""
Shown = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["gloo", "symm", "nccl"])
def pool(request: pytest.FixtureRequest) -> Iterator[RankPool]:
    if reason := unavailable(request.param, RANKS):
        pytest.skip(reason)
    with RankPool(RANKS, request.param, deadline=DEADLINE) as pool:
        yield pool


def loaded(pool: RankPool, name: str) -> None:
    """The pair in the ranks' memory; skips where it cannot use this transport."""
    pair = INSTALLED[name]
    if reason := support(pair, parse_case(line_for(name, RANKS)).world, pool.transport):
        pytest.skip(reason)
    if pool.transport == "gloo" and pair.backend != "torch":
        pytest.skip(f"backend {pair.backend} needs a GPU, or the interpreter's own tests")
    run = pool.run(settle, name, deadline=180.0)
    assert run.ok, run


@pytest.mark.parametrize("name", INSTALLED)
def test_every_routing_is_exact_on_every_rank(pool: RankPool, name: str) -> None:
    loaded(pool, name)
    wrong = {}
    for reason, extra in {**ROUTINGS, "fp16": "dtype=fp16,spread=uneven", "fp32": "dtype=fp32,routing=dup"}.items():
        line = line_for(name, RANKS, extra)
        run = pool.run(call, name, line)
        assert run.ok, f"{reason}: {run}"
        results = judge_world(expectation(line, name), run.results)
        found = [str(f) for judged in results.values() for f in judged.findings]
        if found or "out" not in results or results["out"].checked != sum(parse_case(line).world.tokens) * 20:
            wrong[reason] = found or ["not all of it was compared"]

    assert not wrong


@cache
def soak_inputs(layout: str, number: int) -> tuple[Case, Inputs]:
    """Call `number` of the soak: its case, and the whole layer's inputs, whose weights are those of call 0."""
    line = f"T=12,H=20,I=13,E=7,K=3,layout={layout},values=sat,ranks={RANKS},routing={SOAK[number]},seed={number}"
    case = parse_case(line)
    mine = make_inputs(whole_case(case))
    if number == 0:
        return case, mine
    names = ("hidden_states", "topk_ids", "topk_weights")
    return case, soak_inputs(layout, 0)[1].map({n: getattr(mine, n) for n in names})


def order(iterations: int) -> list[int]:
    """Which call each iteration makes: every one at first, then any but the last one."""
    draw, turns = random.Random(0), list(range(len(SOAK)))
    while len(turns) < iterations:
        turns.append(draw.choice([n for n in range(len(SOAK)) if n != turns[-1]]))
    return turns


def soak(context: RankContext, name: str, iterations: int) -> list[Shown]:
    """Calls on one instance; everything that was shown the first time, and `out` from then on."""
    pair = installed(name)
    world, turns = soak_inputs(pair.layout, 0)[0].world, order(iterations)
    calls = []
    for number in range(len(SOAK)):
        mine = rank_inputs(world, soak_inputs(pair.layout, number)[1], context.rank)
        calls.append(mine.map({name: t.to(context.device) for name, t in mine.tensors()}))
    shown = run_rank(pair, [calls[n] for n in turns], world, GroupLink(context.group, context.device))
    return [{k: t.cpu() for k, t in s.items() if k == "out" or i < len(SOAK)} for i, s in enumerate(shown)]


@pytest.mark.parametrize("name", INSTALLED)
def test_soak_with_changing_routing(pool: RankPool, name: str) -> None:
    """One instance, call after call: each is judged when it comes first, and must have the same bits ever after.

    The inputs are exact, so that no order of summation gives other bits.
    """
    loaded(pool, name)
    pair, turns = INSTALLED[name], order(ITERATIONS[pool.transport])
    run = pool.run(soak, name, len(turns))
    assert run.ok, run
    firsts: dict[int, list[torch.Tensor]] = {}
    for i, number in enumerate(turns):
        shown = [rank[i] for rank in run.results]
        if number not in firsts:
            case, whole = soak_inputs(pair.layout, number)
            expect = WorldExpectation(case.world, whole, pair.claims, pair.quant1)
            assert not [str(f) for r in judge_world(expect, shown).values() for f in r.findings], (i, SOAK[number])
            firsts[number] = [s["out"] for s in shown]
        assert all(torch.equal(s["out"], out) for s, out in zip(shown, firsts[number], strict=True)), (i, SOAK[number])
    assert len(firsts) == len(SOAK)
