"""The one-sided prepare/finalize implementations as candidates for several ranks."""

from __future__ import annotations

from moeproof.optimized.experts import TritonBatchedExperts, TritonExperts
from moeproof.optimized.symm.layout import Payload
from moeproof.optimized.symm.prepare_finalize import SymmBatchedPrepareFinalize, SymmStandardPrepareFinalize
from moeproof.reference.contract.candidate import Claims, RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.world import World


def _payload(inputs: Inputs) -> Payload:
    p = inputs.problem
    dtype = inputs.hidden_states.dtype
    return Payload(p.H, inputs.topk_ids.size(1), dtype, p.H, returned=dtype)


def _standard(inputs: Inputs, world: World, link: Link) -> SymmStandardPrepareFinalize:
    return SymmStandardPrepareFinalize(link, world.grid, world.max_tokens, _payload(inputs))


def _batched(inputs: Inputs, world: World, link: Link) -> SymmBatchedPrepareFinalize:
    rows = world.problem.rows_per_expert
    return SymmBatchedPrepareFinalize(link, world.grid, rows, world.max_tokens, _payload(inputs))


def _experts(inputs: Inputs) -> TritonExperts:
    return TritonExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _batched_experts(inputs: Inputs) -> TritonBatchedExperts:
    return TritonBatchedExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _supports(world: World) -> str | None:
    p = world.problem
    if p.scheme != "none":
        return f"unquantised only (scheme={p.scheme})"
    if p.latent or p.shared or p.router.zero_experts or p.scale_on_sum != 1.0:
        return "the seed's interfaces have no room for shared, identity or latent experts, or a scale of the sum"
    return None


CLAIMS = Claims(deterministic="run")


def rank_pairs() -> list[RankPair]:
    return [
        RankPair("symm-standard", _standard, _experts, "standard", _supports, CLAIMS, "triton", transports=("symm",)),
        RankPair("symm-batched", _batched, _batched_experts, "batched", _supports, CLAIMS, "triton", transports=("symm",)),
    ]
