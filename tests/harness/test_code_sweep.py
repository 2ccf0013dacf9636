"""The quantiser sweep: it holds every code and boundary, its scales are exact, and one code rounded wrongly is seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeproof.harness.cases.code_sweep import points
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.tiers import code_cases
from moeproof.harness.judging.judge import judge, judge_lean
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import FORMATS, Inputs
from moeproof.reference.contract.schemes import SCHEMES
from moeproof.reference.eager import candidates
from moeproof.reference.oracle.quant_stages import quant1

Tensor = torch.Tensor
STAGES = next(c for c in candidates() if c.name == "eager-stages")
ALL_OF_THEM = code_cases()


def test_points_by_hand() -> None:
    """e2m1 has 0 .5 1 1.5 2 3 4 6: 8 values and 7 midpoints; all but 0 have a neighbour below, and all but 6 one above."""
    found = points(FORMATS["e2m1"], FORMATS["fp32"])

    assert {0.0, 0.25, 0.5, 0.75, 5.0, 6.0, -5.0} <= set(found.tolist())
    assert float(torch.nextafter(torch.tensor(2.5), torch.tensor(0.0))) in found.tolist()
    assert found.numel() == 2 * (15 + 14 + 13)


@pytest.mark.parametrize("case", ALL_OF_THEM, ids=lambda case: f"{case.problem.scheme}-{case.problem.dtype}")
def test_a_sweep_is_whole_exact_and_passed(case) -> None:  # type: ignore[no-untyped-def]
    q = case.problem.quant.a1
    inputs = make_inputs(case)
    made = quant1(inputs)
    ratio = inputs.hidden_states.double() / made.scales
    wanted = points(q.format, case.problem.fmt)

    assert bool((torch.frexp(made.scales).mantissa == 0.5).all()), "scales are powers of two"
    assert set(wanted.tolist()) <= set(ratio.flatten().tolist()), "every point is there"
    verdict = judge_lean(STAGES, case, "cpu")
    assert verdict.outcome is Outcome.PASS, verdict


def _away(inputs: Inputs) -> dict[str, Tensor]:
    """One tie of the whole range goes to the odd code."""
    shown = dict(STAGES.run(inputs))
    raw = shown["xq"].clone().view(torch.uint8)
    at = (inputs.hidden_states.double() / quant1(inputs).scales == 19.0).nonzero()[0]
    raw[at[0], at[1]] += 1
    return shown | {"xq": raw.view(shown["xq"].dtype)}


def test_one_tie_that_goes_the_wrong_way_is_seen() -> None:
    """19 lies between e4m3's 18 and 20."""
    case = next(c for c in ALL_OF_THEM if c.problem.scheme == "fp8_token" and c.problem.dtype == "fp32")
    verdict = judge(replace(STAGES, name="one-tie", run=_away), case, "cpu")

    assert SCHEMES["fp8_token"].a1 is not None
    assert verdict.outcome is Outcome.FAIL, verdict
    assert str(verdict.findings[0].stage) == "QUANT1"
