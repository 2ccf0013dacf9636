"""What this package offers to be judged: the entry point `moeproof.candidates`."""

from __future__ import annotations

from moeproof.optimized import fused, layer, plans, search, torch_grouped
from moeproof.optimized.experts import TritonBatchedExperts, TritonExperts
from moeproof.optimized.plans import Plan
from moeproof.optimized.prepare_finalize import TritonBatchedPrepareFinalize, TritonNoEPPrepareFinalize
from moeproof.optimized.quant.candidates import quant_candidates
from moeproof.optimized.symm.candidates import rank_pairs
from moeproof.reference.contract.candidate import Candidate, Claims, Pair, RankPair, Tuning
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem


def _unsupported(problem: Problem) -> str | None:
    """What none of the candidates does."""
    p = problem
    if p.scheme != "none":
        return f"unquantised only (scheme={p.scheme})"
    if p.latent:
        return "latent projections around the experts are not implemented"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "with ep > 1 the shared and identity terms would enter the sum on every rank; only routed experts are split"
    return None


def _layer(problem: Problem) -> str | None:
    if problem.layout != "standard":
        return "this candidate works in the standard layout"
    return _unsupported(problem)


def _fused(problem: Problem) -> str | None:
    return _layer(problem) or fused.unsupported(problem)


def _torch_grouped(problem: Problem) -> str | None:
    return _layer(problem) or torch_grouped.unsupported(problem)


def _pair(problem: Problem, layout: str) -> str | None:
    p = problem
    if p.layout != layout:
        return f"this pair works in the {layout} layout"
    if p.shared or p.router.zero_experts or p.scale_on_sum != 1.0:
        return "the seed's interfaces have no room for shared experts, identity experts or a scale of the sum"
    return _unsupported(p)


def _standard_pair(problem: Problem) -> str | None:
    return _pair(problem, "standard")


def _batched_pair(problem: Problem) -> str | None:
    return _pair(problem, "batched")


def _experts(inputs: Inputs) -> TritonExperts:
    return TritonExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _batched_experts(inputs: Inputs) -> TritonBatchedExperts:
    return TritonBatchedExperts(inputs.b1, inputs.b2, inputs.problem.act)


def _no_ep(_: Inputs) -> TritonNoEPPrepareFinalize:
    return TritonNoEPPrepareFinalize()


def _batched(inputs: Inputs) -> TritonBatchedPrepareFinalize:
    return TritonBatchedPrepareFinalize(inputs.problem.rows_per_expert, inputs.w1.size(0))


TUNING = Tuning(
    run=lambda inputs, text: fused.run_plan(inputs, Plan.parse(text)),
    starts=lambda problem, e: [str(plan) for plan in search.starts(problem, e)],
    axes=search.AXES,
    vary=lambda text, axis: [str(plan) for plan in search.vary(Plan.parse(text), axis)],
    compiled=lambda problem, e: [str(plan) for plan in search.compiled(problem, e)],
    row=lambda problem, e: fused.point(problem, e).model,
    selectable=lambda: [str(plan) for plan in plans.selectable("sm90")],
)
CLAIMS = Claims(ties="lowest", deterministic="run", total_router=True)
"""Not `batch`: the number of tokens chooses the tile, and with it the order of a product's sum."""


def candidates() -> list[Candidate | Pair | RankPair]:
    """All candidates of this package. Without a GPU the Triton ones need the interpreter."""
    return [
        Candidate(
            name="triton",
            run=layer.run,
            shows=("topk_ids", "topk_weights", "sorted_slots", "block_expert", "num_padded", "gate_up", "h", "y", "out"),
            supports=_layer,
            claims=CLAIMS,
            backend="triton",
        ),
        Candidate(
            name="triton-fused",
            run=fused.run,
            shows=("topk_ids", "topk_weights", "sorted_slots", "block_expert", "num_padded", "y", "out"),
            supports=_fused,
            claims=CLAIMS,
            backend="triton",
            tuning=TUNING,
        ),
        Pair(
            name="triton-modular",
            prepare_finalize=_no_ep,
            experts=_experts,
            layout="standard",
            supports=_standard_pair,
            claims=CLAIMS,
            backend="triton",
            slots_in_workspace2=True,
        ),
        Pair(
            name="triton-batched",
            prepare_finalize=_batched,
            experts=_batched_experts,
            layout="batched",
            supports=_batched_pair,
            claims=CLAIMS,
            backend="triton",
        ),
        Candidate(
            name="torch-grouped",
            run=torch_grouped.run,
            shows=("gate_up", "h", "y", "out"),
            supports=_torch_grouped,
            claims=Claims(),
        ),
        *quant_candidates(),
        *rank_pairs(),
    ]
