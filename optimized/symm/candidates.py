"""The one-sided prepare/finalize implementations as candidates for several ranks, each with this package's experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from moeproof.optimized.experts import TritonBatchedExperts, TritonExperts
from moeproof.optimized.quant import candidates as quant
from moeproof.optimized.symm.cuts import Cuts
from moeproof.optimized.symm.layout import Payload
from moeproof.optimized.symm.overlapped import CUTS, SymmOverlappedPrepareFinalize
from moeproof.optimized.symm.prepare_finalize import SymmBatchedPrepareFinalize, SymmStandardPrepareFinalize
from moeproof.reference.contract.candidate import Claims, RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.overlap import FusedMoEOverlappedKernel
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.world import World


def payload(p: Problem) -> Payload:
    """How rows of a problem travel."""
    q, dtype = p.quant.a1, p.fmt.dtype
    if q is None:
        return Payload(p.H, p.slots, dtype, p.H, returned=dtype)
    columns = q.code_shape(1, p.H)[1]
    groups = q.groups(p.H) if q.by_token else 0
    return Payload(p.H, p.slots, q.format.dtype, columns, q.scale_format(p.fmt).dtype, groups, returned=dtype)


def _standard(inputs: Inputs, world: World, link: Link) -> SymmStandardPrepareFinalize:
    p = inputs.problem
    return SymmStandardPrepareFinalize(link, world.grid, world.max_tokens, payload(p), p.quant)


def overlapped(inputs: Inputs, world: World, link: Link, cuts: Cuts = CUTS) -> SymmOverlappedPrepareFinalize:
    p = inputs.problem
    return SymmOverlappedPrepareFinalize(link, world.grid, world.max_tokens, payload(p), p.quant, cuts)


def _batched(inputs: Inputs, world: World, link: Link) -> SymmBatchedPrepareFinalize:
    p, rows = inputs.problem, world.problem.rows_per_expert
    return SymmBatchedPrepareFinalize(link, world.grid, rows, world.max_tokens, payload(p), scheme=p.quant)


def _experts(inputs: Inputs) -> TritonExperts:
    return TritonExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _batched_experts(inputs: Inputs) -> TritonBatchedExperts:
    return TritonBatchedExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _routed_only(p: Problem) -> str | None:
    if p.latent or p.shared or p.router.zero_experts or p.scale_on_sum != 1.0:
        return "the seed's interfaces have no room for shared, identity or latent experts, or a scale of the sum"
    return None


def _plain(world: World) -> str | None:
    p = world.problem
    return f"unquantised only (scheme={p.scheme})" if p.scheme != "none" else _routed_only(p)


def _quantised(fp8: bool) -> Callable[[World], str | None]:
    def supports(world: World) -> str | None:
        p = world.problem
        if reason := quant.unsupported(p, fp8) or _routed_only(p):
            return reason
        if p.quant.a1 is not None and not p.quant.a1.by_token and not p.quant.a1.static:
            return f"scheme {p.scheme}: no rank knows the scale of all ranks' tokens before they travel"
        return None

    return supports


def rank_pairs() -> list[RankPair]:
    """Both layouts, unquantised and for each set of quantised products; two micro-batches at once."""
    layouts = (("standard", _standard, _experts, quant.experts), ("batched", _batched, _batched_experts, quant.batched_experts))
    how: dict[str, Any] = {"transports": ("symm",), "capturable": True}
    pairs = []
    for layout, front, experts, quant_experts in layouts:
        pairs.append(RankPair(f"symm-{layout}", front, experts, layout, _plain, Claims(), "triton", **how))
        for name, fp8 in (("fp8", True), ("quant", False)):
            pairs.append(
                RankPair(
                    f"symm-{name}-{layout}",
                    front,
                    quant_experts,
                    layout,
                    _quantised(fp8),
                    quant.CLAIMS[fp8],
                    "triton",
                    taps=quant.taps,
                    **how,
                )
            )
    plain = pairs[0]
    halves = replace(plain, name="symm-standard-overlapped", prepare_finalize=overlapped, kernel=FusedMoEOverlappedKernel)
    return [*pairs, halves]
