"""What the plain value recipes are there to show, each proved on inputs or on a fault that hides elsewhere.

The probes' own promises are test_probes.py's, those of the exact probe of quantised schemes test_quant_healthy.py's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Claims, Inputs
from moeproof.reference.eager import candidates
from moeproof.reference.oracle.activations import split
from moeproof.reference.oracle.chain import chain
from moeproof.reference.oracle.codes import from_codes
from moeproof.reference.oracle.quant_stages import quant1
from moeproof.reference.oracle.quantise import quantise

Tensor = torch.Tensor
LAYER = "T=33,H=104,I=72,E=8,K=2"
SCALED = "T=16,H=128,I=128,E=3,K=2"
STAGES = next(c for c in candidates() if c.name == "eager-stages")


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _live(case: Case, name: str) -> Tensor:
    inputs = make_inputs(case)
    value = chain(inputs, Claims())[name].value
    return value if name == "out" else value[inputs.topk_ids >= 0]


@pytest.mark.parametrize("act", ["silu", "gelu", "swigluoai", "silu:interleaved"])
def test_normal_sits_where_activations_differ_and_halves_do_not_agree(act: str) -> None:
    case = parse_case(f"{LAYER},act={act},seed=1")
    gate, up = split(_live(case, "gate_up"), case.problem.act)
    scale = case.problem.act.limit / 2 if case.problem.act.limit else 1.0

    assert 0.6 * scale < _rms(gate) < 2.5 * scale
    assert _rms(gate) > 1.3 * _rms(up)
    assert 0.3 < _rms(_live(case, "out")) < 3 * max(scale, 1.0)


def test_hetero_spreads_tokens_channels_and_experts_over_binades() -> None:
    inputs = make_inputs(parse_case("T=64,H=256,I=64,E=8,K=2,values=hetero,seed=1"))
    for t in (inputs.hidden_states, inputs.hidden_states.T, inputs.w1[0], inputs.w2[0]):
        size = t.double().square().mean(dim=1).sqrt().log2()
        assert float(size.max() - size.min()) > 3.5
    experts = inputs.w2.double().square().mean(dim=(1, 2)).sqrt().log2()
    assert float(experts.max() - experts.min()) > 2


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_integer_sums_are_exact_whatever_their_order(dtype: str) -> None:
    inputs = make_inputs(parse_case(f"{LAYER},values=int,dtype={dtype},seed=1"))
    x, w = inputs.hidden_states.float(), inputs.w1[0].float()
    order = torch.randperm(104, generator=torch.Generator().manual_seed(1))
    value = chain(inputs, Claims())["gate_up"]

    assert value.bound is not None and not bool(value.bound.any())
    assert torch.equal(x @ w.T, x[:, order] @ w[:, order].T)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_a_saturated_gate_makes_every_stage_exact(dtype: str) -> None:
    case = parse_case(f"{LAYER},values=sat,dtype={dtype},seed=1")
    trace = chain(make_inputs(case), Claims())

    assert all(value.bound is not None and not bool(value.bound.any()) for value in trace.values())
    gate = split(_live(case, "gate_up"), case.problem.act)[0]
    assert set((gate / 128).unique().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}
    assert float((_live(case, "h") != 0).double().mean()) > 0.2


def test_groups_give_neighbouring_groups_and_rows_other_scales() -> None:
    inputs = make_inputs(parse_case(f"{SCALED},scheme=nvfp4,values=groups,seed=1"))
    scale = from_codes(inputs.w1_scale.view(torch.uint8), inputs.problem.quant.w.scale_format(inputs.problem.fmt))  # type: ignore[union-attr]
    along = (scale[:, :, 1:] / scale[:, :, :-1]).log2().abs()
    across = (scale[:, 1:] / scale[:, :-1]).log2().abs()

    assert float((along > 0.5).double().mean()) > 0.9
    assert float((across > 0.3).double().mean()) > 0.8


@pytest.mark.parametrize(("scheme", "top"), [("mxfp8", 448.0), ("mxfp4_w4a4", 6.0)])
def test_edges_hold_empty_blocks_and_an_amax_at_and_beside_powers_of_two(scheme: str, top: float) -> None:
    x = make_inputs(parse_case(f"T=32,H=256,I=64,E=3,K=2,scheme={scheme},values=edges,seed=1")).hidden_states.double()
    blocks = x.unflatten(1, (-1, 16)).abs().amax(dim=-1).flatten()
    mantissa = torch.frexp(blocks[blocks > 0]).mantissa * 2
    power = 2.0 ** torch.tensor(top).log2().floor()

    assert bool((blocks == 0).any()) and bool((x == 0).all(dim=1).any())
    assert {1.0, 2 * (1.0 - 2.0**-8), 1.0 + 2.0**-7, float(top / power)} <= set(mantissa.tolist())


def test_ties_lie_between_codes_where_formulas_part() -> None:
    """int8: half of an amax is 63.5 steps, so that each spelling of the quotient rounds its own way somewhere."""
    inputs = make_inputs(parse_case("T=33,H=256,I=64,E=3,K=2,dtype=fp32,scheme=int8_token,values=ties,seed=1"))
    q = inputs.problem.quant.a1
    assert q is not None
    made = {
        spelling: quantise(inputs.hidden_states.double(), replace(q, quotient=spelling), inputs.problem.fmt).codes()
        for spelling in ("divide", "reciprocal", "inverse")
    }

    # On ordinary data they differ in 0.05% of the codes at the most (docs/tolerances.md section 8).
    for spelling in ("reciprocal", "inverse"):
        assert float((made["divide"] != made[spelling]).double().mean()) > 0.005, spelling


def _last_expert_twice(i: Inputs) -> Inputs:
    w = i.w1.clone()
    w[-1] = w[-2]
    return i.map({"w1": w})


def _scale_of_the_row_before(i: Inputs) -> Inputs:
    return i.map({"w1_scale": i.w1_scale.roll(1, dims=1)})  # type: ignore[union-attr]


def _x_in_bf16(i: Inputs) -> Inputs:
    return i.map({"hidden_states": i.hidden_states.bfloat16().float()})


FAULTS: tuple[tuple[str, Callable[[Inputs], Inputs], str], ...] = (
    (f"{LAYER},values=normal,seed=2", _last_expert_twice, "GEMM1"),
    (f"{SCALED},scheme=fp8_token,values=groups,seed=2", _scale_of_the_row_before, "GEMM1"),
    (f"{SCALED},scheme=fp8_token,values=hetero,seed=2", _scale_of_the_row_before, "GEMM1"),
    (f"{LAYER},dtype=fp32,values=normal,seed=2", _x_in_bf16, "GEMM1"),
)


@pytest.mark.parametrize(("line", "harm", "stage"), FAULTS, ids=[f"{f.__name__}-{n}" for n, (_, f, _) in enumerate(FAULTS)])
def test_a_recipe_shows_its_fault(line: str, harm: Callable[[Inputs], Inputs], stage: str) -> None:
    broken = Candidate("broken", lambda i: STAGES.run(harm(i)), STAGES.shows)
    verdict = judge(broken, parse_case(line), "cpu")

    assert verdict.outcome is Outcome.FAIL, verdict
    assert str(verdict.findings[0].stage) == stage


def test_the_quantisers_input_is_what_quant1_reads() -> None:
    """Decoded codes of `pin` are x itself."""
    inputs = make_inputs(parse_case(f"{SCALED},scheme=fp8_token,values=pin,seed=1"))

    assert torch.equal(quant1(inputs).values, inputs.hidden_states.double())
