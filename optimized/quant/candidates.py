"""The quantised candidates: the layer and both pairs, once for products of fp8 codes, once for all others.

Two sets, because they claim different accumulators: Hopper's tensor cores sum products of e4m3 codes with 13 fraction bits,
and everything else here in float32 or int32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from moeproof.optimized import plans
from moeproof.optimized.plans import Plan
from moeproof.optimized.quant import fused, layer, packed, search, torch_scaled
from moeproof.optimized.quant.experts import Levels, QuantBatchedExperts, QuantExperts
from moeproof.optimized.quant.multiply import multiplier
from moeproof.optimized.quant.prepare import QuantBatchedPrepareFinalize, QuantNoEPPrepareFinalize
from moeproof.optimized.quant.tiles import mean_rows
from moeproof.optimized.tiles import interpreted, rows_per_block
from moeproof.reference.contract.candidate import Candidate, Claims, Pair, Tuning
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
SHOWS = (
    *("topk_ids", "topk_weights", "xq", "xs", "sorted_slots", "block_expert", "num_padded"),
    *("gate_up", "h", "hq", "hs", "y", "out"),
)
CLAIMS = {
    True: Claims(accumulate="fp8_promoted", ties="lowest", total_router=True),
    False: Claims(ties="lowest", total_router=True),
}
"""By whether products are of fp8 codes. Promotion every 128 terms: measured at 10 * 2^-13 S on an H100."""
HOPPER, ROWS = (9, 0), 64
"""Its products of fp8 codes take blocks of this many rows. Smaller ones Triton multiplies as fp16, which holds every code, and
their sums are float32's: at most 0.0006 of what promotion allows (docs/results/quant_ratios_h100.json)."""


def block_rows(p: Problem) -> int:
    """Rows of a program's tile of either product, in the layer and in both pairs."""
    slots = p.T * p.slots
    if p.layout == "batched":
        return rows_per_block(mean_rows(slots, p.weight_experts, p.rows_per_expert), 1)
    return rows_per_block(slots, p.weight_experts)


def claims_in(p: Problem) -> Claims:
    """Of fp8 codes: the interpreter's sums are float32's as well."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == HOPPER
    plain = interpreted() or (hopper and block_rows(p) < ROWS)
    return replace(CLAIMS[True], accumulate="fp32") if plain else CLAIMS[True]


def _multiplies_fp8(p: Problem) -> bool:
    assert p.quant.w is not None
    return multiplier(p.quant.a1, p.quant.w).operand == "e4m3fn"


def unsupported(p: Problem, fp8: bool) -> str | None:
    """What the set of these products does not do."""
    if not p.quant.quantised:
        return "quantised schemes only"
    if _multiplies_fp8(p) != fp8:
        return f"scheme {p.scheme} {'does not multiply' if fp8 else 'multiplies'} fp8 codes: another candidate's"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "with ep > 1 the shared and identity terms would enter the sum on every rank; only routed experts are split"
    return None


def _layer(fp8: bool) -> Callable[[Problem], str | None]:
    def supports(p: Problem) -> str | None:
        if p.layout != "standard":
            return "this candidate works in the standard layout"
        return unsupported(p, fp8)

    return supports


def _pair(fp8: bool, layout: str) -> Callable[[Problem], str | None]:
    def supports(p: Problem) -> str | None:
        if p.layout != layout:
            return f"this pair works in the {layout} layout"
        if p.shared or p.router.zero_experts or p.scale_on_sum != 1.0:
            return "the seed's interfaces have no room for shared experts, identity experts or a scale of the sum"
        return unsupported(p, fp8)

    return supports


def _levels(inputs: Inputs) -> Levels:
    a1 = inputs.problem.quant.a1
    return Levels(inputs.a1_scale if a1 is not None and a1.two_level else None, inputs.w1_global, inputs.w2_global)


def experts(inputs: Inputs) -> QuantExperts:
    """With h kept, so that QUANT2 can be judged on bits."""
    p = inputs.problem
    return QuantExperts(p.quant, _levels(inputs), inputs.b1, inputs.b2, p.act, keep_h=True)


def batched_experts(inputs: Inputs) -> QuantBatchedExperts:
    p = inputs.problem
    return QuantBatchedExperts(p.quant, _levels(inputs), inputs.b1, inputs.b2, p.act, keep_h=True)


def _no_ep(inputs: Inputs) -> QuantNoEPPrepareFinalize:
    return QuantNoEPPrepareFinalize(inputs.problem.quant)


def _batched(inputs: Inputs) -> QuantBatchedPrepareFinalize:
    return QuantBatchedPrepareFinalize(inputs.problem.quant, inputs.problem.rows_per_expert, inputs.w1.size(0))


def taps(parts: FusedMoEPermuteExpertsUnpermute) -> dict[str, Tensor]:
    """What these experts kept of their last `apply`."""
    assert isinstance(parts, (QuantExperts, QuantBatchedExperts))
    return parts.taps()


def _set(name: str, fp8: bool) -> list[Candidate | Pair]:
    pairs = (("modular", "standard", _no_ep, experts), ("batched", "batched", _batched, batched_experts))
    return [
        Candidate(name, layer.run, SHOWS, _layer(fp8), CLAIMS[fp8], backend="triton", claims_in=claims_in if fp8 else None),
        *(
            Pair(
                *(f"{name}-{kind}", front, back, layout, _pair(fp8, layout), CLAIMS[fp8]),
                backend="triton",
                taps=taps,
                claims_in=claims_in if fp8 else None,
            )
            for kind, layout, front, back in pairs
        ),
    ]


def _whole(unsupported: Callable[[Problem], str | None]) -> Callable[[Problem], str | None]:
    """What a fused layer does, among layers in the standard layout."""

    def supports(p: Problem) -> str | None:
        if not p.quant.quantised:
            return "quantised schemes only"
        return unsupported(p) or _layer(_multiplies_fp8(p))(p)

    return supports


def _tuning(run_plan: Callable[[Inputs, Plan], dict[str, Tensor]], schemes: tuple[str, ...], fast: bool) -> Tuning:
    return Tuning(
        run=lambda inputs, text: run_plan(inputs, Plan.parse(text)),
        starts=lambda problem, e: [str(plan) for plan in search.starts(problem, e, fast)],
        axes=search.AXES,
        vary=lambda text, axis: [str(plan) for plan in search.vary(Plan.parse(text), axis, fast)],
        compiled=lambda problem, e: [str(plan) for plan in search.compiled(problem, e, fast)],
        row=lambda problem, e: fused.point(problem, e, fast).model,
        selectable=lambda: [str(plan) for scheme in schemes for plan in plans.selectable("sm90", scheme + "-fast" * fast)],
    )


def _fused() -> list[Candidate | Pair]:
    """The fused layers. Those of fp8 codes come with two accumulators: promoted every 128 terms, and the tensor core's own,
    which most public kernels for scales of tokens and channels use."""
    aligned = ("topk_ids", "topk_weights", "sorted_slots", "block_expert", "num_padded", "y", "out")
    fast = Claims(accumulate="fp8_unpromoted", ties="lowest", total_router=True)
    found: list[Candidate | Pair] = []
    for name, run, claims in (("triton-fp8-fused", fused.run, CLAIMS[True]), ("triton-fp8-fast", fused.run_fast, fast)):
        tuning = _tuning(fused.run_plan, fused.SCHEMES, run is fused.run_fast)
        shows = ("xq", "xs", *aligned)
        found.append(Candidate(name, run, shows, _whole(fused.unsupported), claims, backend="triton", tuning=tuning))
    tuning = _tuning(packed.run_plan, (packed.SCHEME,), False)
    whole = _whole(packed.unsupported)
    return [*found, Candidate("triton-mxfp4", packed.run, aligned, whole, CLAIMS[False], backend="triton", tuning=tuning)]


def quant_candidates() -> list[Candidate | Pair]:
    """All candidates of quantised schemes."""
    shown = ("xq", "xs", "gate_up", "h", "hq", "hs", "y", "out")
    # Without fast accumulation its product on an H100 is Triton's with promotion every 128 terms: the same share of results
    # misrounded to the last digit on every kind of data (docs/results/accumulators-h100.json).
    claims = Claims(accumulate="fp8_promoted")
    torch_s = Candidate("torch-scaled-grouped", torch_scaled.run, shown, torch_scaled.unsupported, claims)
    return [*_set("triton-fp8", True), *_set("triton-quant", False), *_fused(), torch_s]
