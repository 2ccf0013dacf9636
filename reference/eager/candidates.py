"""This folder as candidates, judged by the harness like anyone else's."""

from __future__ import annotations

import torch

from moeproof.reference.contract.candidate import Candidate, Claims, Pair, RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.eager import layer
from moeproof.reference.eager.experts_of import batched_experts, standard_experts, taps
from moeproof.reference.eager.prepare_finalize import BatchedPrepareAndFinalize, NoEPPrepareAndFinalize
from moeproof.reference.eager.ranks_candidates import rank_pairs
from moeproof.reference.eager.router import route

CLAIMS = Claims(ties="lowest", total_router=True)


def _outside_the_seed(p: Problem) -> str | None:
    """What the seed's interfaces have no argument for."""
    if p.shared:
        return "the seed's interfaces have no shared expert"
    if p.router.zero_experts:
        return "the seed's interfaces have no identity experts"
    if p.latent:
        return "the seed's interfaces have no latent projection"
    if p.scale_on_sum != 1.0:
        return "finalize has no factor on the routed sum"
    return None


def supports_standard(p: Problem) -> str | None:
    if p.layout != "standard":
        return f"layout {p.layout}: this pair is standard"
    return _outside_the_seed(p)


def supports_batched(p: Problem) -> str | None:
    if p.layout != "batched":
        return f"layout {p.layout}: this pair is batched"
    return _outside_the_seed(p)


def supports_stages(p: Problem) -> str | None:
    if p.layout != "standard":
        return f"layout {p.layout}: rows stay with their tokens here"
    if p.latent and p.router.zero_experts:
        return "an identity expert adds x (H wide) to a sum in the latent width"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "shared and identity terms would enter the sum on every rank; only routed experts are split"
    if p.latent_norm and p.ep > 1:
        return "latent_norm of a partial sum is no part of the norm of the sum"
    return None


def _show_router(inputs: Inputs) -> dict[str, torch.Tensor]:
    ids, weights = route(inputs)
    return {"topk_ids": ids, "topk_weights": weights}


def candidates() -> list[Candidate | Pair | RankPair]:
    """Two seed-style pairs (one for each layout), the router alone, the whole layer stage by stage, and the pairs for ranks."""
    return [
        Pair(
            "eager",
            lambda inputs: NoEPPrepareAndFinalize(inputs.problem.quant),
            standard_experts,
            supports=supports_standard,
            claims=CLAIMS,
            slots_in_workspace2=True,
            taps=taps,
        ),
        Pair(
            "eager-batched",
            lambda inputs: BatchedPrepareAndFinalize(inputs.problem.rows_per_expert, scheme=inputs.problem.quant),
            batched_experts,
            layout="batched",
            supports=supports_batched,
            claims=CLAIMS,
            taps=taps,
        ),
        Candidate("eager-router", _show_router, ("topk_ids", "topk_weights"), claims=CLAIMS),
        Candidate(
            "eager-stages",
            layer.run,
            ("topk_ids", "topk_weights", "xq", "xs", "gate_up", "h", "hq", "hs", "y", "out"),
            supports=supports_stages,
            claims=CLAIMS,
        ),
        *rank_pairs(supports_standard, supports_batched, CLAIMS),
    ]
