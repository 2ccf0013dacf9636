"""Each probe holds what its name promises, proved on the oracle's tensors."""

from __future__ import annotations

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.probes import patterns
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.schemes import FORMATS
from moeproof.reference.oracle.activations import split
from moeproof.reference.oracle.chain import chain
from moeproof.reference.oracle.experts import gemm1
from moeproof.reference.oracle.value import Value

LAYER = "T=33,H=104,I=72,E=8,K=2"
SATURATED = ("silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_tanh_no_mul", "silu:interleaved")


def trace(line: str) -> dict[str, Value]:
    return dict(chain(make_inputs(parse_case(line)), Claims()))


@pytest.mark.parametrize("act", SATURATED)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_tagged_is_exact_and_no_two_rows_are_alike(act: str, dtype: str) -> None:
    """Every (token, expert) has its own y, so whatever is misplaced is told by one element."""
    layer = f"T=33,H=104,I=72,E=8,K=8,act={act},dtype={dtype},values=tagged,seed=1"
    value = trace(layer)
    for name in ("gate_up", "h", "y", "out"):
        bound = value[name].bound
        assert bound is not None
        assert not bool(bound.any()), name

    rows = value["y"].value.reshape(-1, 104)
    assert rows.unique(dim=0).shape[0] == 33 * 8
    inputs = make_inputs(parse_case(layer))
    for (t, k), expert in zip(
        torch.cartesian_prod(torch.arange(33), torch.arange(8)).tolist(), inputs.topk_ids.flatten().tolist(), strict=True
    ):
        bits = (value["y"].value[t, k, :3] > (5 if "no_mul" in act else 2)).long()
        assert int((bits * torch.tensor([1, 2, 4])).sum()) == expert


@pytest.mark.parametrize(("dtype", "H"), [("bf16", 104), ("fp16", 1000), ("fp32", 256)])
def test_wide_sums_are_exact_and_need_12_bits_and_more(dtype: str, H: int) -> None:
    line = f"T=5,H={H},I=16,E=4,K=2,dtype={dtype},values=wide,seed=1"
    inputs = make_inputs(parse_case(line))
    gate_up = gemm1(inputs, inputs.hidden_states, inputs.problem.fmt, Claims())
    assert gate_up.bound is not None
    assert not bool(gate_up.bound.any())

    quantum = float(inputs.w1.double().abs().min()) * (2.0**-8 if dtype == "fp32" else 1.0)
    exact = torch.einsum("th,enh->ten", inputs.hidden_states.double(), inputs.w1.double()).abs() / quantum
    bits = exact.max().log2()
    assert 12 < float(bits) < 24
    signs = torch.einsum("th,enh->ten", inputs.hidden_states.double(), inputs.w1.double()).sign().mean()
    assert abs(float(signs)) < 0.5


def test_cancelling_slots_leave_less_than_bf16_resolves() -> None:
    inputs = make_inputs(parse_case(f"{LAYER},values=cancel,seed=1"))
    y = trace(f"{LAYER},values=cancel,seed=1")["y"].value
    terms = inputs.topk_weights.double()[:, :, None] * y
    left = terms.sum(1).abs() / terms.abs().sum(1)

    assert bool((inputs.topk_ids[:, 0] ^ 1 == inputs.topk_ids[:, 1]).all())
    assert float(left[:, 0::2].max()) < 2.0**-8
    assert float(left[:, 1::2].median()) > 0.1


@pytest.mark.parametrize("act", ["silu:limit=1", "swigluoai", "swiglustep:limit=1"])
def test_clamp_goes_beyond_the_limit_on_both_sides(act: str) -> None:
    case = parse_case(f"{LAYER},act={act},values=clamp,seed=1")
    limit = case.problem.act.limit or 0.0
    gate, up = split(trace(str(case))["gate_up"].value, case.problem.act)
    for half in (gate, up):
        assert float(half.max()) > 4 * limit
        assert float(half.min()) < -4 * limit
        assert float((half.abs() > limit).double().mean()) > 0.4


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "gelu_no_mul"])
def test_tail_gates_lie_between_minus_3_and_minus_4(act: str) -> None:
    case = parse_case(f"{LAYER},act={act},values=tail,seed=1")
    gate_up = trace(str(case))["gate_up"].value
    gate = split(gate_up, case.problem.act)[0] if case.problem.act.gated else gate_up
    inside = (gate > -4.25) & (gate < -2.75)

    assert float(inside.double().mean()) > 0.99
    assert 0.03 < float(trace(str(case))["y"].value.pow(2).mean().sqrt()) < 30


def test_asym_scales_differ_along_every_axis() -> None:
    inputs = make_inputs(parse_case("T=64,H=256,I=256,E=6,K=2,values=asym,seed=1"))
    w = inputs.w1.double()
    assert float(w[2].std() / w[0].std()) > 1.5
    assert float(w[0, 192:256].std() / w[0, :64].std()) > 1.2
    assert float(w[0, :, :64].std() / w[0, :, -64:].std()) > 1.2
    assert float(inputs.hidden_states[-16:].double().std() / inputs.hidden_states[:16].double().std()) > 1.2


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_the_sweep_holds_every_finite_pattern(name: str) -> None:
    fmt = FORMATS[name]
    values = patterns(fmt, 2**16, torch.device("cpu"))
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(fmt.dtype).double()
    assert set(values.tolist()) == set(every[every.isfinite()].tolist()) | {1.0}


def test_a_whole_sweep_meets_each_gate_with_each_up() -> None:
    case = parse_case("T=512,H=320,I=256,E=1,K=1,values=sweep")
    gate, up = split(trace(str(case))["gate_up"].value, case.problem.act)
    both = {u: set(gate[up == u].tolist()) for u in up.unique().tolist()}

    assert len(both) == 2
    # Between -104 and -70 silu's results are next to float32's least, and left out.
    first, second = ({g for g in gates if g > -60 and abs(g) > 2.0**-90} for gates in both.values())
    assert first == second
    assert len(first) > 30000
