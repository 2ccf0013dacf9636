"""CUDA stages as candidates: all of them, and two mixes in which every pair of backends meets at every seam.

seam             cuda         cuda-triton-gemm  triton-cuda-gemm  triton (optimized.candidates)
route, align     cuda cuda    triton cuda       cuda triton       triton triton
align, gemm1     cuda cuda    cuda triton       triton cuda       triton triton
gemm1, act       cuda cuda    triton cuda       cuda triton       triton triton
act, gemm2       cuda cuda    cuda triton       triton cuda       triton triton
gemm2, combine   cuda cuda    triton cuda       cuda triton       triton triton
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.optimized import router as triton_router
from moeproof.optimized.cuda import align, grouped_gemm, quantised, router, stages, toolkit
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

MIXES: dict[str, tuple[str, ...]] = {
    "cuda": stages.NAMES,
    "cuda-triton-gemm": ("align", "act", "combine"),
    "triton-cuda-gemm": ("route", "gemm1", "gemm2"),
}
"""Stages that come from CUDA, by the candidate's name; the others are Triton's."""
CLAIMS = Claims(ties="lowest", deterministic="run", total_router=True)


def unsupported(problem: Problem, cuda: tuple[str, ...]) -> str | None:
    """Why a mix with these CUDA stages cannot do the problem on this machine, or None."""
    p = problem
    if p.layout != "standard":
        return "this candidate works in the standard layout"
    if p.scheme != "none":
        return f"quantised experts are not implemented (scheme={p.scheme})"
    if p.latent:
        return "latent projections around the experts are not implemented"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "with ep > 1 the shared and identity terms would enter the sum on every rank; only routed experts are split"
    if reason := (router if "route" in cuda else triton_router).unsupported(p):
        return reason
    if "align" in cuda and len(p.local) > align.MOST_EXPERTS:
        return f"the CUDA sort takes at most {align.MOST_EXPERTS} local experts, not {len(p.local)}"
    if "gemm1" in cuda and (reason := grouped_gemm.unsupported(p)):
        return reason
    return _no_toolkit()


def _no_toolkit() -> str | None:
    return toolkit.missing(toolkit.architecture(torch.device("cuda"))) if torch.cuda.is_available() else None


def _quantised(problem: Problem) -> str | None:
    return quantised.unsupported(problem) or _no_toolkit()


def _candidate(name: str, cuda: tuple[str, ...]) -> Candidate:
    chosen = stages.mix(cuda)
    supports: Callable[[Problem], str | None] = lambda problem: unsupported(problem, cuda)  # noqa: E731
    run: Callable[[Inputs], dict[str, torch.Tensor]] = lambda inputs: stages.run(inputs, chosen)  # noqa: E731
    shows = ("topk_ids", "topk_weights", "sorted_slots", "block_expert", "num_padded", "gate_up", "h", "y", "out")
    return Candidate(name=name, run=run, shows=shows, supports=supports, claims=CLAIMS, backend="cuda")


def candidates() -> list[Candidate]:
    """All candidates of this folder: the mixes, and the quantisers inside a plain layer."""
    quantisers = Candidate(
        name="cuda-quantisers",
        run=quantised.run,
        shows=("xq", "xs", "gate_up", "h", "hq", "hs", "y", "out"),
        supports=_quantised,
        backend="cuda",
    )
    return [*(_candidate(name, cuda) for name, cuda in MIXES.items()), quantisers]
