"""Every prepare/finalize with its experts on 1 to 4 processes over gloo: the contract, rank by rank."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from gloo_ranks import GlooRanks, pair_on_cases
from rank_kit import PAIRS, ROUTINGS, SHOWING, every_pair, every_ranks, expectation, findings, line_for, on_ranks

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_world_inputs
from moeproof.harness.ranks.checks import check_conservation, check_same_bits, judge_world
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import Link


@every_pair
@every_ranks
@pytest.mark.parametrize("reason", ROUTINGS)
def test_every_rank_gets_its_rows_and_its_output(gloo: GlooRanks, name: str, ranks: int, reason: str) -> None:
    """Exact inputs: rows, counts, y and out of every rank must be right to the last bit."""
    line = line_for(name, ranks, ROUTINGS[reason])
    expect = expectation(line, name)
    shown = [answer[0] for answer in gloo.results(pair_on_cases, ranks, name, [line])]
    results = judge_world(expect, shown)

    assert not [str(f) for r in results.values() for f in r.findings]
    assert results["out"].checked == sum(expect.world.tokens) * 20
    assert results["out"].ratio == 0
    assert name not in SHOWING or ("rows" in results and not check_conservation(expect, shown))


@every_pair
@pytest.mark.parametrize(
    "extra",
    [
        "values=normal,placement=round_robin,spread=uneven,expert_bias=1",
        "values=hetero,dtype=fp16,spread=uneven",
        "values=normal,dtype=fp32,routing=dup,redundant=4",
        "values=normal,routing=zipf,router=sigmoid:fused_shared=1,spread=empty",
        "values=normal,K=1,weight_on_input=1,spread=uneven",
        "values=normal,strided=1,inplace=1,spread=uneven",
    ],
)
def test_other_problems_within_their_bounds(gloo: GlooRanks, name: str, extra: str) -> None:
    line = line_for(name, 3, extra)
    shown = [answer[0] for answer in gloo.results(pair_on_cases, 3, name, [line])]

    assert not findings(expectation(line, name), shown)


@every_pair
@pytest.mark.parametrize("extra", ["tp=2,spread=uneven", "tp=2,sp=1,spread=uneven", "tp=4,sp=1", "tp=4,expert_bias=1"])
def test_tensor_parallel_shards(gloo: GlooRanks, name: str, extra: str) -> None:
    line = line_for(name, 4, "values=normal,routing=minus1", extra)
    shown = [answer[0] for answer in gloo.results(pair_on_cases, 4, name, [line])]

    assert not findings(expectation(line, name), shown)


@every_pair
def test_calls_back_to_back_leave_nothing_behind(gloo: GlooRanks, name: str) -> None:
    """One instance, other data, other routing, fewer tokens and the first call again: each as if it were alone."""
    first = line_for(name, 3, "values=normal,routing=uniform,spread=uneven")
    others = [first.replace("seed=5", "seed=6"), line_for(name, 3, "routing=none,spread=uneven")]
    lines = [first, *others, first]
    answers = gloo.results(pair_on_cases, 3, name, lines)
    by_call = [[answer[n] for answer in answers] for n in range(len(lines))]

    for line, shown in zip(lines, by_call, strict=True):
        assert not findings(expectation(line, name), shown)
    again = check_same_bits("out", [s["out"] for s in by_call[-1]], [s["out"] for s in by_call[0]], "the first call")
    assert not again


class Late:
    """A link whose rank 1 comes late to every collective."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._link, name)
        if callable(value) and self._link.rank == 1:
            time.sleep(0.004)
        return value


def late_calls(link: Link, pair: str, lines: list[str]) -> list[Any]:
    return pair_on_cases(Late(link), pair, lines)  # type: ignore[arg-type]


@every_pair
def test_a_late_rank_gets_this_call_and_not_the_next(gloo: GlooRanks, name: str) -> None:
    """P82: other data in every call, one rank always behind; nothing of a later call may reach an earlier one."""
    lines = [line_for(name, 3, f"routing={routing},spread=uneven") for routing in ("dup", "hot", "minus1")]
    answers = gloo.results(late_calls, 3, name, lines)

    for n, line in enumerate(lines):
        assert not findings(expectation(line, name), [answer[n] for answer in answers])


@every_pair
def test_processes_and_threads_give_the_same_bits(gloo: GlooRanks, name: str) -> None:
    """Row for row. A reduce-scatter may add in another order, and y past the counts of a region is nobody's."""
    undefined = {"eager-allgather": "out", "eager-batched-alltoall": "y"}.get(name)
    line = line_for(name, 4, "values=normal,spread=uneven")
    case = parse_case(line)
    inputs = make_world_inputs(case)
    threads = on_ranks(4, lambda link: run_rank(PAIRS[name], [inputs[link.rank]], case.world, link)[0])
    processes = [answer[0] for answer in gloo.results(pair_on_cases, 4, name, [line])]

    for a, b in zip(threads, processes, strict=True):
        assert a.keys() == b.keys()
        for tensor in a:
            if tensor == undefined:
                continue
            assert torch.equal(_bytes(a[tensor]), _bytes(b[tensor])), tensor


def _bytes(t: torch.Tensor) -> torch.Tensor:
    return t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
