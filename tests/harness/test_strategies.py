"""Search by hypothesis: every drawn case reads back, and planted routing faults are found and come out small."""

from __future__ import annotations

from pathlib import Path

import pipeline
import pytest
import torch
from hypothesis import HealthCheck, given, settings

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.strategies import cases, search
from moeproof.harness.judging.judge import judge_lean
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import ContractError, Inputs

SETTINGS = settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))

PLAIN = {
    "router": "softmax",
    "act": "silu",
    "scheme": "none",
    "extra": "none",
    "layout": "standard",
    "ranks": "1",
    "history": "none",
}
"""What the small pipeline of these tests can do."""


@SETTINGS
@given(cases())
def test_every_drawn_case_reads_back(case: Case) -> None:
    assert parse_case(str(case)) == case


@SETTINGS
@given(cases(layout="batched", values="int", dtype="fp16"))
def test_fixed_axes_stay_fixed(case: Case) -> None:
    assert (case.problem.layout, case.values, case.problem.dtype) == ("batched", "int", "fp16")


def test_an_unknown_axis_is_named() -> None:
    with pytest.raises(ContractError, match="axis 'speed' is not known; allowed: E, K"):
        search(lambda case: True, speed=9)


def _first_power_of_two_only(inputs: Inputs) -> torch.Tensor:
    """A prefix sum over the largest power of two of experts: the rest get nothing."""
    whole = 1 << (inputs.problem.E.bit_length() - 1)
    return pipeline.gemm1(inputs.map({"topk_ids": torch.where(inputs.topk_ids < whole, inputs.topk_ids, -1)}))


def test_search_finds_a_fault_that_needs_many_experts() -> None:
    candidate = pipeline.candidate("scan", gemm1=_first_power_of_two_only, route=lambda i: (i.topk_ids, i.topk_weights))

    def fails(case: Case) -> bool:
        return any(f.tensor == "gate_up" for f in judge_lean(candidate, case, "cpu").findings)

    found = search(fails, examples=100, **PLAIN)
    assert found is not None
    assert found.problem.E in (5, 12, 18, 34, 60, 144)
    assert found.problem.T <= 9

    assert search(lambda case: case.problem.T > 1000, examples=20) is None


def test_nothing_is_found_in_a_healthy_candidate() -> None:
    right = pipeline.Candidate("right", lambda i: pipeline.Pipeline()(i)["out"])

    def fails(case: Case) -> bool:
        return case.routing not in ("beyond", "router") and judge_lean(right, case, "cpu").outcome is Outcome.FAIL

    assert search(fails, examples=60, **PLAIN) is None


def test_the_search_that_the_docs_show_runs() -> None:
    """docs/plugging-in.md, with fewer examples and a layer whose output is 1% low."""
    page = (Path(__file__).parents[2] / "docs" / "plugging-in.md").read_text(encoding="utf-8")
    code = page.split("## Searching")[1].split("```python\n")[1].split("```")[0]
    assert "examples=200" in code
    low = pipeline.Candidate("low", lambda i: (pipeline.Pipeline()(i)["out"].float() * 0.99).to(i.hidden_states.dtype))
    names: dict[str, object] = {"mine": low}
    exec(code.replace("examples=200", "examples=10"), names)

    assert isinstance(names["worst"], Case)
    assert callable(names["test_my_moe"])
