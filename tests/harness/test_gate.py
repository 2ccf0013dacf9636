"""The L0 gate: real wrong results are told apart, and a case that cannot is VACUOUS, never PASS."""

from __future__ import annotations

from collections.abc import Callable

import pipeline
import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.sample import draw
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.judging.expect import Expectation
from moeproof.harness.judging.gate import accepts
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.lint import lint, lint_all
from moeproof.harness.judging.rerun import Fault, faults_of, rerun, tail, without_tail
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Claims, Inputs
from moeproof.reference.oracle.chain import chain

LAYER = "T=33,H=104,I=72,E=8,K=2"


def test_a_tail_is_the_last_tile() -> None:
    assert [tail(n) for n in (104, 128, 64, 65, 40, 16, 8, 1)] == [40, 64, 16, 1, 8, 16, 8, 1]


def test_dropped_columns_are_the_product_without_them() -> None:
    inputs = make_inputs(parse_case(f"{LAYER},seed=1"))
    fault = Fault("gate_up", lambda x: without_tail(x, 40))
    wrong = rerun("gate_up", fault, inputs.hidden_states, inputs, Claims())
    ids = inputs.topk_ids.long()
    want = torch.einsum("th,tknh->tkn", inputs.hidden_states[:, :64].double(), inputs.w1[ids][..., :64].double())

    torch.testing.assert_close(wrong, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("act", ["silu", "swigluoai", "silu:interleaved", "relu2_no_mul"])
@pytest.mark.parametrize("name", ["gate_up", "h", "y", "out"])
def test_a_rerun_without_harm_is_the_oracle_and_every_fault_reaches(act: str, name: str) -> None:
    inputs = make_inputs(parse_case(f"{LAYER},act={act},shared=24,scale_on_sum=2.5,seed=1"))
    right = chain(inputs, Claims())
    healthy = rerun(name, Fault("gate_up", lambda x: x), inputs.hidden_states, inputs, Claims())

    torch.testing.assert_close(healthy, right[name].value, rtol=1e-12, atol=1e-12)
    order = ("gate_up", "h", "y", "out")
    for kind, fault in faults_of(inputs.problem).items():
        if order.index(fault.breaks) <= order.index(name):
            at = order.index(fault.breaks)
            start = right[order[at - 1]].value if at else inputs.hidden_states
            assert not torch.allclose(rerun(name, fault, start, inputs, Claims()), healthy), kind


@pytest.mark.parametrize("shown", [("out",), ("gate_up", "h", "y", "out"), ("y", "out")])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_ordinary_cases_reject_everything(shown: tuple[str, ...], dtype: str) -> None:
    """On isolated and on chained bounds."""
    expect = Expectation(make_inputs(parse_case(f"{LAYER},dtype={dtype},seed=1")), Claims())
    perfect = {n: expect.chained(n).value.to(expect.inputs.problem.fmt.dtype) for n in shown}
    for name in shown:
        assert accepts(name, perfect, expect) == []


def test_what_is_mathematically_the_same_is_not_counted() -> None:
    """One token rolls onto itself, and no slot is missing where none is routed."""
    for line in (
        "T=1,H=64,I=48,E=5,K=1",
        f"{LAYER},routing=none",
        "T=0,H=8,I=8,E=4,K=2",
        f"{LAYER},act=relu_no_mul,values=sat",
    ):
        verdict = judge(Candidate("plain", lambda i: {"out": _out(i)}), parse_case(line), "cpu")
        assert verdict.outcome is not Outcome.VACUOUS, verdict


def _out(inputs: Inputs) -> torch.Tensor:
    return chain(inputs, Claims())["out"].value.to(inputs.problem.fmt.dtype)


def _light_slot(i: Inputs) -> Inputs:
    return i.map({"topk_weights": i.topk_weights * torch.tensor([1.0, 1e-12])})


def _loud_bias(i: Inputs) -> Inputs:
    """Biases beside which no product counts."""
    assert i.b1 is not None
    return i.map({"b1": torch.full_like(i.b1, 2.0**28)})


@pytest.mark.parametrize(
    ("hide", "tensor", "words"),
    [(_light_slot, "out", "the last slot missing"), (_loud_bias, "gate_up", "the last K tile (40 of 104) of GEMM1 dropped")],
)
def test_inputs_that_hide_a_fault_are_noticed(hide: Callable[[Inputs], Inputs], tensor: str, words: str) -> None:
    """The light slot is the trap of logit-derived weights."""
    case = parse_case(f"{LAYER},expert_bias=1,dtype=fp32,seed=9")
    for change, noticed in ((hide, True), (lambda i: i, False)):
        expect = Expectation(change(make_inputs(case)), Claims())
        perfect = {tensor: expect.chained(tensor).value.float()}

        assert (words in accepts(tensor, perfect, expect)) == noticed


def test_every_case_of_a_tier_can_see() -> None:
    complaints = {str(case): lint(case) for case in [*cases_of("quick"), *map(draw, range(40))]}

    assert {line: why for line, why in complaints.items() if why} == {}
    assert lint_all(cases_of("quick")) == []


def test_lint_says_what_is_missing() -> None:
    assert "no case has a slot of -1" in lint_all([parse_case(LAYER)])
    assert "no case has a batch without tokens" in lint_all([parse_case(LAYER)])


def test_a_vacuous_verdict_names_the_reasons() -> None:
    loose = Claims(accumulate="dtype")
    case = parse_case("T=2,H=1536,I=8,E=2,K=2,seed=1")
    verdict = judge(Candidate("loose", lambda i: {"gate_up": pipeline.gemm1(i)}, ("gate_up",), claims=loose), case, "cpu")

    assert verdict.outcome is Outcome.VACUOUS, verdict
    assert "gate_up would pass for zeros, half" in verdict.reason
    assert "the last K tile (64 of 1536) of GEMM1 dropped" in verdict.reason
