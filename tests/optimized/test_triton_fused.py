"""The fused layer: every kind of plan on ragged cases, through the judge; and the plans themselves as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.optimized import fused, plans, search
from moeproof.optimized.candidates import CLAIMS
from moeproof.optimized.plans import Plan, Point
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip
from moeproof.reference.contract import Candidate, ContractError, Problem

KINDS = {
    "pointers": "16x64x128-g1-w4-s4 16x32x64-g2-w4-s4",
    "descriptors": "32x64x64-g1-w4-s4-tma 32x64x128-g1-w4-s3-tma",
    "persistent": "64x128x64-g4-w4-s4-tma-p1-bulk 64x64x64-g2-w4-s4-tma-p2-flat",
    "pointers, persistent": "16x64x64-g4-w4-s3-p1 16x64x64-g1-w4-s3-p2",
}
CASES = (
    "T=19,H=72,I=40,E=3,K=2,routing=dup",
    "T=37,H=40,I=72,E=4,K=1,routing=minus1",
    "T=9,H=88,I=24,E=5,K=3,dtype=fp16,act=swigluoai,expert_bias=1,scale_on_sum=2.5",
    "T=7,H=33,I=17,E=4,K=2,act=relu2_no_mul,shared=16,strided=1",
)
"""Ragged everywhere: many tiles in both directions; written at once; interleaved and biased; rows no descriptor can name."""


def check(plan: str, line: str) -> None:
    candidate = Candidate(
        name="fused", run=lambda inputs: fused.run_plan(inputs, Plan.parse(plan)), claims=CLAIMS, backend="triton"
    )
    verdict = judge(candidate, parse_case(line))

    assert verdict.outcome is Outcome.PASS, str(verdict)


@pytest.mark.parametrize("line", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_tiles(kind: str, line: str) -> None:
    check(KINDS[kind], line)


@pytest.mark.parametrize(
    "line",
    [
        "T=2,H=40,I=24,E=4,K=2,routing=dup",
        "T=3,H=33,I=17,E=4,K=1,weight_on_input=1,routing=minus1",
        "T=1,H=40,I=24,E=4,K=3,dtype=fp16,act=swigluoai,expert_bias=1,scale_on_sum=2.5,storage=KN",
        "T=2,H=40,I=24,E=6,K=2,act=gelu_no_mul,ep=2,ep_rank=1",
        "T=0,H=40,I=24,E=4,K=2",
    ],
)
def test_strips(line: str) -> None:
    check("v16x32-w4-s1 v8x64-w4-s1", line) if "T=0" not in line else _empty(line)


def _empty(line: str) -> None:
    """No token: nothing to judge, and nothing may be launched."""
    from moeproof.harness.cases.inputs import make_inputs

    for plan in (plans.STRIPS, plans.DECODE):
        assert fused.run_plan(make_inputs(parse_case(line)), plan)["out"].shape == (0, 40)


def test_exact_arithmetic_from_end_to_end() -> None:
    """Saturated gates: no rounding anywhere, so that every bit must agree."""
    check(KINDS["persistent"], "T=20,H=64,I=64,E=6,K=2,values=sat,routing=empty")


def test_text_and_back() -> None:
    for plan in [*plans.selectable("sm90"), Plan(search.TILES[0], search.TILES[1], True), Plan.parse(KINDS["persistent"])]:
        assert Plan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("16x64x128-g1-w4-s4", "plans are"),
        ("16x64-g1 16x64-g1", "tiles look like"),
        ("v8 v8", "strips look like"),
        ("v8x512-w4-s1 16x64x128-g1-w4-s4", "both are strips"),
        ("16x64x128-g1-w4-s4 32x64x128-g1-w4-s4", "one map of row blocks"),
    ],
)
def test_refused_plans(text: str, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        Plan.parse(text)


def test_the_table_decides_and_the_rule_does_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = Point("bf16", 4, 2, 64, 32, 100)
    row = {"1": str(plans.STRIPS), "64": str(plans.DECODE), "4096": KINDS["persistent"]}
    (tmp_path / "plans_sm90.json").write_text(json.dumps({"plans": {known.model: row}}))
    monkeypatch.setattr(plans, "FOLDER", tmp_path)
    plans.table.cache_clear()
    cpu = torch.device("cpu")

    assert plans.choose(known, cpu) == plans.DECODE
    assert plans.choose(Point("fp16", 4, 2, 64, 32, 10**4), cpu) == Plan.parse(KINDS["persistent"])
    assert plans.choose(Point("bf16", 4, 2, 64, 32, 10**6), cpu) == plans.RULE[-1][1]
    assert plans.choose(Point("bf16", 5, 2, 64, 32, 10**6), cpu) == plans.RULE[-1][1]
    assert {str(p) for p in plans.selectable("sm90")} >= set(row.values())
    plans.table.cache_clear()


def test_the_search_stays_in_its_lists() -> None:
    """What `compiled` names is all that the search can launch, but for groups, which are no constants of a kernel."""
    problem = Problem(T=64, H=2048, I=768, E=128, K=8)
    for T in (1, 64, 1024, 16384):
        compiled = {_ungrouped(plan) for plan in search.compiled(Problem(**vars(problem) | {"T": T}), 128)}
        for start in search.starts(Problem(**vars(problem) | {"T": T}), 128):
            reached = [start, *(plan for axis in search.AXES for plan in search.vary(start, axis))]
            for plan in reached:
                for one in (plan.first, plan.second):
                    assert _ungrouped(Plan(one, one, plan.overlap)) in compiled


def _ungrouped(plan: Plan) -> str:
    first, second = (
        part if isinstance(part, Strip) else Tile.parse(str(part).replace(f"-g{part.group_m}-", "-g1-"))
        for part in (plan.first, plan.second)
    )
    return str(Plan(first, second, plan.overlap))
