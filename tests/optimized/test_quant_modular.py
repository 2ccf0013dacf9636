"""The quantised candidates: judged on one case of each kind, refusals before any launch, honest workspaces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from plain_layer import DEVICE

from moeproof.harness import interpreter, modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pairs import QUANT_ARGUMENTS, as_candidate
from moeproof.harness.verdict import Outcome
from moeproof.optimized.quant import candidates as quant
from moeproof.optimized.quant import gemm, torch_scaled
from moeproof.optimized.quant.candidates import block_rows, claims_in, quant_candidates
from moeproof.optimized.quant.experts import Levels, QuantBatchedExperts, QuantExperts
from moeproof.optimized.quant.prepare import QuantBatchedPrepareFinalize, QuantNoEPPrepareFinalize
from moeproof.optimized.quant.tiles import quant_tile
from moeproof.reference.contract import SCHEMES, Candidate, ContractError, FusedMoEModularKernel, Inputs

Tensor = torch.Tensor
CANDIDATES = {c.name: as_candidate(c) for c in quant_candidates()}
JUDGED = [
    "T=5,H=64,I=40,E=4,K=1,scheme=fp8_tensor,act=swigluoai,weight_on_input=1,routing=minus1,seed=1",
    "T=5,H=200,I=136,E=5,K=2,scheme=fp8_block,layout=batched,values=groups,routing=empty,seed=2",
    "T=5,H=40,I=24,E=4,K=2,scheme=int8_token,layout=batched,values=hetero,strided=1,seed=3",
    "T=4,H=64,I=32,E=3,K=2,scheme=int4_w4a16_zp_g32,values=groups,expert_bias=1,storage=KN,seed=4",
    "T=4,H=128,I=128,E=5,K=2,scheme=int4_w4a8,layout=batched,ep=2,ep_rank=1,placement=round_robin,seed=5",
    "T=5,H=64,I=32,E=3,K=2,scheme=mxfp4_w4a8_static,values=pin,routing=dup,seed=6",
    "T=5,H=64,I=32,E=3,K=2,scheme=mxfp6_e3m2,layout=batched,values=pin,seed=7",
    "T=4,H=64,I=32,E=3,K=2,scheme=nvfp4_encode,shared=24,shared_gate=1,scale_on_sum=2.5,seed=8",
    "T=4,H=64,I=32,E=3,K=2,scheme=nvfp4,layout=batched,inplace=1,act=relu2_no_mul,values=groups,seed=9",
    "T=4,H=64,I=32,E=3,K=2,scheme=mxfp8_up,dtype=fp32,values=groups,routing=zipf,seed=10",
    "T=4,H=96,I=96,E=3,K=2,scheme=mxfp8,values=least,seed=11",
    "T=4,H=96,I=96,E=3,K=2,scheme=mxfp4_w4a16,values=least,seed=12",
    "T=4,H=96,I=96,E=3,K=2,scheme=mxfp4_w4a8_up,layout=batched,values=least,seed=13",
]


@pytest.mark.parametrize("line", JUDGED, ids=lambda line: line.split("scheme=")[1].split(",seed")[0])
def test_judged(line: str) -> None:
    case, passed = parse_case(line), []
    for candidate in CANDIDATES.values():
        verdict = judge(candidate, case, DEVICE)
        assert verdict.outcome in (Outcome.PASS, Outcome.UNSUPPORTED), verdict
        passed += [candidate.name] * (verdict.outcome is Outcome.PASS)

    assert [n for n in passed if n != "torch-scaled-grouped"]


def given(scheme: str, layout: str = "standard") -> Inputs:
    return make_inputs(parse_case(f"T=4,H=128,I=128,E=3,K=2,scheme={scheme},layout={layout},routing=uniform"), DEVICE)


def kernel(inputs: Inputs) -> FusedMoEModularKernel:
    p = inputs.problem
    a1 = inputs.a1_scale if p.quant.a1 is not None and p.quant.a1.two_level else None
    levels = Levels(a1, inputs.w1_global, inputs.w2_global)
    if p.layout == "batched":
        front: Any = QuantBatchedPrepareFinalize(p.quant, 8, p.E)
        return FusedMoEModularKernel(front, QuantBatchedExperts(p.quant, levels, act=p.act))
    return FusedMoEModularKernel(QuantNoEPPrepareFinalize(p.quant), QuantExperts(p.quant, levels, act=p.act))


def call(inputs: Inputs, **changes: object) -> Tensor:
    arguments = {name: getattr(inputs, name) for name in QUANT_ARGUMENTS} | changes
    w1, w2 = (arguments.pop(name, getattr(inputs, name)) for name in ("w1", "w2"))
    return kernel(inputs)(inputs.hidden_states, w1, w2, inputs.topk_weights, inputs.topk_ids, **arguments)


def swapped(t: Tensor) -> Tensor:
    return t.transpose(1, 2).contiguous()


REFUSED: list[tuple[str, str, Any, str]] = [
    ("fp8_token", "w1_scale", None, "w1_scale is None"),
    ("fp8_token", "w1_scale", lambda t: t.flatten(1), r"w1_scale is \(3, 256\), must be \(3, 256, 1\)"),
    ("fp8_token", "w2_scale", lambda t: t.to(torch.bfloat16), "w2_scale is torch.bfloat16, must be torch.float32"),
    ("fp8_token", "a1_scale", lambda _: torch.ones(1, 1, device=DEVICE), "a1_scale was given"),
    ("fp8_token", "a2_scale", lambda _: torch.ones(1, 1, device=DEVICE), "a2_scale was given"),
    ("fp8_token", "w1", lambda t: t.view(torch.uint8), "w1 is torch.uint8"),
    ("fp8_block", "w1_scale", swapped, "last two dims are swapped"),
    ("fp8_tensor_static", "a1_scale", None, "a1_scale is None"),
    ("fp8_tensor_static", "a2_scale", lambda t: t.flatten(), r"a2_scale is \(1,\), must be \(1, 1\)"),
    ("int4_w4a16_zp_g32", "w2_zp", None, "w2_zp is None"),
    ("int4_w4a16_g32", "w1_zp", lambda _: torch.zeros(3, 128, 4, dtype=torch.uint8, device=DEVICE), "w1_zp was given"),
    ("int4_w4a16_g32", "w1_scale", lambda t: t[:, :, :2], r"w1_scale is \(3, 256, 2\), must be \(3, 256, 4\)"),
    ("mxfp4_w4a4", "w1_scale", lambda t: t.float(), "w1_scale is torch.float32, must be torch.uint8"),
    ("nvfp4", "a2_scale", lambda t: t[:1], r"a2_scale is \(1, 1, 1\), must be \(3, 1, 1\)"),
]


@pytest.mark.parametrize(("scheme", "name", "change", "message"), REFUSED, ids=[" ".join(r[:2]) for r in REFUSED])
def test_refusals_come_before_any_launch_of_the_experts(scheme: str, name: str, change: Any, message: str) -> None:
    inputs = given(scheme, "standard")
    wrong = None if change is None else change(getattr(inputs, name))
    if not modes.interpreting():
        with pytest.raises(ContractError, match=message):
            call(inputs, **{name: wrong})
        return
    with interpreter.sanitized() as log, pytest.raises(ContractError, match=message):
        call(inputs, **{name: wrong})

    # QUANT1 comes first: `apply` cannot refuse before prepare has run.
    assert {launch.kernel for launch in log.launches} <= {"_quantise", "_largest"}


def test_constructors_and_levels_are_checked() -> None:
    inputs = given("nvfp4")
    bare = FusedMoEModularKernel(QuantNoEPPrepareFinalize(inputs.problem.quant), QuantExperts(inputs.problem.quant))
    scales = {name: getattr(inputs, name) for name in QUANT_ARGUMENTS}
    with pytest.raises(ContractError, match="w1_global"):
        bare(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids, **scales)
    with pytest.raises(ContractError, match="does not quantise weights"):
        QuantExperts(SCHEMES["none"])


@pytest.mark.parametrize("scheme", ["fp8_token", "fp8_tensor", "mxfp4_w4a16", "nvfp4"])
@pytest.mark.parametrize("keep_h", [False, True])
def test_workspaces_are_declared_honestly(scheme: str, keep_h: bool) -> None:
    """Exactly the declared elements are used, whatever they held; rows of dead slots are zeros."""
    inputs = given(scheme)
    p, ids = inputs.problem, inputs.topk_ids.clone()
    ids[1, 0] = ids[3, 1] = -1
    a1 = inputs.a1_scale if p.quant.a1 is not None and p.quant.a1.two_level else None
    experts = QuantExperts(p.quant, Levels(a1, inputs.w1_global, inputs.w2_global), act=p.act, keep_h=keep_h)
    front = QuantNoEPPrepareFinalize(p.quant)
    x = inputs.hidden_states
    xq, xs, *_ = front.prepare(x, inputs.a1_scale, inputs.a2_scale, inputs.topk_weights, ids, p.E, None, False)
    n13, n2, dtype = experts.workspace_shapes(x, xq, p.T, p.N, p.H, p.K, p.E)
    results = []
    for poison in (float("nan"), 1e4):
        spaces = [torch.full((n + 64,), poison, dtype=dtype, device=DEVICE) for n in (n13, n2)]
        inner = [s[32:-32] for s in spaces]
        scales = (inputs.w1_scale, inputs.w2_scale, inputs.w1_zp, inputs.w2_zp, xs, inputs.a2_scale)
        y = experts.apply(xq, inputs.w1, inputs.w2, ids, "silu", p.E, None, *scales, *inner, None)
        results.append(y.clone())
        for space in spaces:
            edges = torch.cat([space[:32], space[-32:]])
            assert torch.equal(edges.nan_to_num(-1.0), torch.full_like(edges, poison).nan_to_num(-1.0))

    assert torch.equal(*results)
    assert bool((results[0][ids < 0] == 0).all())
    with pytest.raises(ContractError, match=f"workspace2 has {n2 - 1} elements"):
        experts.apply(xq, inputs.w1, inputs.w2, ids, "silu", p.E, None, *scales, inner[0], inner[1][:-1], None)


def test_empty_calls_and_nothing_routed() -> None:
    for layout in ("standard", "batched"):
        inputs = given("fp8_tensor", layout)
        none = replace(inputs, topk_ids=torch.full_like(inputs.topk_ids, -1))
        assert bool((call(none) == 0).all())
        nothing = {n: getattr(inputs, n)[:0] for n in ("hidden_states", "topk_weights", "topk_ids")}
        assert call(replace(inputs, **nothing)).shape == (0, 128)


def _float_product(codes: Tensor, w: Tensor, s: Tensor, ws: Tensor, offs: Tensor, **more: Any) -> Tensor:
    """What torch._scaled_grouped_mm means, in float32."""
    out, first = torch.full((codes.size(0), w.size(2)), 7.0, dtype=more["out_dtype"]), 0
    for expert, end in enumerate(offs.tolist()):
        rows = codes[first:end].float() @ w[expert].float()
        out[first:end] = rows * s[first:end, None] * ws[expert]
        first = end
    return out


def test_torch_s_scaled_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the product itself, which only a GPU has."""
    case = parse_case("T=6,H=64,I=32,E=4,K=2,scheme=fp8_token,values=hetero,routing=minus1,shared=16,seed=3")
    ours = CANDIDATES["torch-scaled-grouped"]
    if DEVICE == "cpu":
        assert "compute capability 9.0" in str(ours.supports(case.problem))
        monkeypatch.setattr(torch_scaled, "_scaled_grouped_mm", _float_product)
        ours = replace(ours, supports=lambda problem: None)
    verdict = judge(ours, case, DEVICE)

    assert verdict.outcome is Outcome.PASS, verdict
    for change in ("scheme=fp8_block", "scheme=fp8_token,expert_bias=1", "scheme=fp8_token,storage=KN"):
        line = f"T=6,H=64,I=32,E=4,K=2,{change}"
        assert isinstance(torch_scaled.unsupported(parse_case(line).problem), str)


@pytest.mark.parametrize("layout", ["standard", "batched"])
@pytest.mark.parametrize(
    "sizes", ["T=3,E=3,K=2", "T=40,E=2,K=2", "T=70,E=3,K=3", "T=200,E=2,K=1", "T=90,E=4,K=1,ep=2,ep_rank=1"]
)
def test_the_rows_that_a_claim_is_made_by_are_those_of_the_tiles(
    sizes: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, seen = parse_case(f"{sizes},H=32,I=32,scheme=fp8_token,layout={layout}"), set()

    def recorded(block_m: int, *rest: Any) -> Any:
        seen.add(block_m)
        return quant_tile(block_m, *rest)

    monkeypatch.setattr(gemm, "quant_tile", recorded)
    for candidate in CANDIDATES.values():
        if candidate.claims_in is not None and candidate.supports(case.problem) is None:
            candidate.run(make_inputs(case, DEVICE))

    assert seen == {block_rows(case.problem)}


def test_small_blocks_claim_float32_on_hopper_and_all_do_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (parse_case(f"T={T},H=32,I=32,E=2,K=2,scheme=fp8_token").problem for T in (4, 200))
    for interpreting, capability, claims in (
        (True, (9, 0), ("fp32", "fp32")),
        (False, (9, 0), ("fp32", "fp8_promoted")),
        (False, (8, 9), ("fp8_promoted", "fp8_promoted")),  # its cores take fp8 in small blocks too
    ):
        monkeypatch.setattr(quant, "interpreted", lambda interpreting=interpreting: interpreting)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        assert tuple(claims_in(p).accumulate for p in (small, large)) == claims


def test_support_is_declared() -> None:
    """Each scheme has exactly one of both sets; the claim of fp8 accumulation is made where fp8 codes are multiplied.

    Fused layers stand beside the sets, for the schemes they were made for.
    """
    for name, scheme in SCHEMES.items():
        for layout, count in (("standard", 2), ("batched", 1)):
            problem = parse_case(f"T=4,H=128,I=128,E=4,K=2,layout={layout},scheme={name}").problem
            able = [c for c in quant_candidates() if c.backend == "triton" and c.supports(problem) is None]
            sets = [c for c in able if not isinstance(c, Candidate) or c.tuning is None]
            assert len(sets) == count * scheme.quantised
            assert len({c.claims for c in sets}) <= 1
    assert all(isinstance(c, Candidate) == ("modular" not in c.name and "batched" not in c.name) for c in quant_candidates())
