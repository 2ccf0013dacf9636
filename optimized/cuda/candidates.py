"""CUDA stages as candidates: all of them, and mixes in which every pair of backends meets at every seam.

Seams are the pairs of stages of which one hands its tensors to the other (stages.SEAMS, quant_stages.SEAMS). With the layers
whose stages are all Triton's (`triton`, `triton-fp8`, `triton-quant`), each meets each:

seam             cuda         cuda-triton-gemm  triton-cuda-gemm  triton
route, align     cuda cuda    triton cuda       cuda triton       triton triton
align, gemm1     cuda cuda    cuda triton       triton cuda       triton triton
gemm1, act       cuda cuda    triton cuda       cuda triton       triton triton
act, gemm2       cuda cuda    cuda triton       triton cuda       triton triton
gemm2, combine   cuda cuda    triton cuda       cuda triton       triton triton

and so it is with cuda-fp8, cuda-quant-triton-gemm and triton-quant-cuda-gemm, and in the batched layout (batched.SEAMS) with
cuda-batched, cuda-batched-triton-gemm and triton-batched-cuda-gemm. Other mixes: mixed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from moeproof.optimized import router as triton_router
from moeproof.optimized.cuda import align, batched, grouped_gemm, quant_stages, quantise, router, scaled_gemm, stages, toolkit
from moeproof.optimized.cuda.batched import StagedBatchedExperts, StagedBatchedPrepareFinalize
from moeproof.optimized.cuda.modular import StagedExperts, StagedPrepareFinalize, StagedQuantExperts
from moeproof.optimized.quant.candidates import claims_in
from moeproof.optimized.quant.experts import QuantExperts
from moeproof.reference.contract.candidate import Candidate, Claims, Pair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute
from moeproof.reference.contract.problem import Problem

MIXES: dict[str, tuple[str, ...]] = {
    "cuda": stages.NAMES,
    "cuda-triton-gemm": ("weigh", "align", "act", "combine", "clear"),
    "triton-cuda-gemm": ("route", "gemm1", "gemm2"),
}
"""Stages that come from CUDA, by the candidate's name; the others are Triton's."""
QUANT_MIXES: dict[str, tuple[str, ...]] = {
    "cuda-fp8": quant_stages.NAMES,
    "cuda-quant-triton-gemm": ("weigh", "quantise", "align", "requantise", "combine", "clear"),
    "triton-quant-cuda-gemm": ("gemm1", "gemm2"),
}
"""The same for quantised layers."""
BATCHED_MIXES: dict[str, tuple[str, ...]] = {
    "cuda-batched": batched.NAMES,
    "cuda-batched-triton-gemm": ("move", "act", "combine"),
    "triton-batched-cuda-gemm": ("place", "gemm1", "gemm2"),
}
"""The same for pairs in the batched layout."""
SHOWS = ("topk_ids", "topk_weights", "sorted_slots", "block_expert", "num_padded", "gate_up", "h", "y", "out")
QUANT_SHOWS = ("xq", "xs", "sorted_slots", "block_expert", "num_padded", "gate_up", "h", "hq", "hs", "y", "out")
CLAIMS = Claims(ties="lowest", deterministic="run", total_router=True)
QUANT_CLAIMS = Claims(accumulate="fp8_promoted")
"""torch's product of fp8 codes and Triton's both move their sums to float32 every 128 terms."""


def unsupported(problem: Problem, cuda: tuple[str, ...], layout: str = "standard") -> str | None:
    """Why a mix with these CUDA stages cannot do the problem on this machine, or None."""
    p = problem
    if p.scheme != "none":
        return f"quantised experts are not implemented (scheme={p.scheme})"
    if p.latent:
        return "latent projections around the experts are not implemented"
    if reason := _layer(p, cuda, layout):
        return reason
    if layout == "standard" and (reason := (router if "route" in cuda else triton_router).unsupported(p)):
        return reason
    if "gemm1" in cuda or "gemm2" in cuda:
        return grouped_gemm.unsupported(p)
    return None


def quant_unsupported(problem: Problem, cuda: tuple[str, ...]) -> str | None:
    """The same for a quantised layer."""
    p, scheme = problem, problem.quant
    if scheme.a1 is None or scheme.a2 is None or scheme.w is None:
        return f"scheme {p.scheme} quantises no activations: there is nothing for these quantisers to do"
    if scheme.a1.two_level or scheme.w.two_level:
        return f"scales of two levels are not implemented (scheme={p.scheme})"
    for name, q in (("quantise", scheme.a1), ("requantise", scheme.a2)):
        if name in cuda and (reason := quantise.unsupported(q)):
            return reason
    if reason := _layer(p, cuda):
        return reason
    if "gemm1" in cuda or "gemm2" in cuda:
        return scaled_gemm.unsupported(p)
    return None


def _layer(p: Problem, cuda: tuple[str, ...], layout: str = "standard") -> str | None:
    """What no layer here does, whatever its numbers."""
    if p.layout != layout:
        return f"this candidate works in the {layout} layout"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "with ep > 1 the shared and identity terms would enter the sum on every rank; only routed experts are split"
    if ("align" in cuda or "place" in cuda) and len(p.local) > align.MOST_EXPERTS:
        return f"the CUDA sort takes at most {align.MOST_EXPERTS} local experts, not {len(p.local)}"
    return toolkit.missing(toolkit.architecture(torch.device("cuda"))) if cuda and torch.cuda.is_available() else None


def _no_room(p: Problem) -> str | None:
    if p.shared or p.router.zero_experts or p.scale_on_sum != 1.0:
        return "the seed's interfaces have no room for shared experts, identity experts or a scale of the sum"
    return None


def candidate(name: str, cuda: tuple[str, ...]) -> Candidate:
    """The plain layer with these stages from CUDA and the others from Triton."""
    chosen = stages.mix(cuda)
    supports: Callable[[Problem], str | None] = lambda problem: unsupported(problem, cuda)  # noqa: E731
    run: Callable[[Inputs], dict[str, torch.Tensor]] = lambda inputs: stages.run(inputs, chosen)  # noqa: E731
    return Candidate(name=name, run=run, shows=SHOWS, supports=supports, claims=CLAIMS, backend="cuda")


def quant_candidate(name: str, cuda: tuple[str, ...]) -> Candidate:
    """The quantised layer, in the same way."""
    chosen = quant_stages.mix(cuda)
    supports: Callable[[Problem], str | None] = lambda problem: quant_unsupported(problem, cuda)  # noqa: E731
    run: Callable[[Inputs], dict[str, torch.Tensor]] = lambda inputs: quant_stages.run(inputs, chosen)  # noqa: E731
    triton = None if "gemm1" in cuda or "gemm2" in cuda else _triton_claims
    return Candidate(name, run, QUANT_SHOWS, supports, QUANT_CLAIMS, backend="cuda", claims_in=triton)


def _triton_claims(problem: Problem) -> Claims:
    """Where both products are Triton's they are those of its layer; of other codes than fp8's the claim says nothing."""
    return replace(QUANT_CLAIMS, accumulate=claims_in(problem).accumulate)


def _taps(experts: FusedMoEPermuteExpertsUnpermute) -> dict[str, torch.Tensor]:
    assert isinstance(experts, QuantExperts)
    return experts.taps()


def pairs() -> list[Pair]:
    """The stages of `cuda` and `cuda-fp8` behind the seed's interfaces, and the mixes in the batched layout."""
    return [
        Pair(
            name="cuda-modular",
            prepare_finalize=lambda inputs: StagedPrepareFinalize(),
            experts=lambda inputs: StagedExperts(stages.CUDA, inputs.b1, inputs.b2, inputs.problem.act),
            supports=lambda problem: _no_room(problem) or unsupported(problem, stages.NAMES),
            claims=CLAIMS,
            backend="cuda",
            slots_in_workspace2=True,
        ),
        Pair(
            name="cuda-fp8-modular",
            prepare_finalize=lambda inputs: StagedPrepareFinalize(quant_stages.CUDA, inputs.problem.quant),
            experts=lambda inputs: StagedQuantExperts(
                inputs.problem.quant, quant_stages.CUDA, inputs.b1, inputs.b2, inputs.problem.act, keep_h=True
            ),
            supports=lambda problem: _no_room(problem) or quant_unsupported(problem, quant_stages.NAMES),
            claims=QUANT_CLAIMS,
            backend="cuda",
            taps=_taps,
        ),
        *(batched_pair(name, cuda) for name, cuda in BATCHED_MIXES.items()),
    ]


def batched_pair(name: str, cuda: tuple[str, ...]) -> Pair:
    """The layer in the batched layout with these stages from CUDA and the others from Triton."""
    chosen = batched.mix(cuda)
    return Pair(
        name=name,
        prepare_finalize=lambda i: StagedBatchedPrepareFinalize(chosen, i.problem.rows_per_expert, i.w1.size(0)),
        experts=lambda i: StagedBatchedExperts(chosen, i.b1, i.b2, i.problem.act),
        layout="batched",
        supports=lambda problem: _no_room(problem) or unsupported(problem, cuda, "batched"),
        claims=CLAIMS,
        backend="cuda",
    )


def candidates() -> list[Candidate | Pair]:
    """All candidates of this folder."""
    plain = [candidate(name, cuda) for name, cuda in MIXES.items()]
    return [*plain, *(quant_candidate(name, cuda) for name, cuda in QUANT_MIXES.items()), *pairs()]
