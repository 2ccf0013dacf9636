"""ROUTE in CUDA C++: the twin of optimized.router, with its signature and its rows for NaN and infinite logits."""

from __future__ import annotations

import torch

from moeproof.optimized.cuda import library
from moeproof.optimized.router import check_arguments
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

SCORES = ("softmax", "softmax_topk", "sigmoid", "sqrtsoftplus", "sparsemixer")
RENORMS = ("none", "sum", "eps", "floor", "lp")
"""In the order of the codes in router.cu."""
MOST_EXPERTS, MOST_SLOTS, MOST_GROUPS = 1024, 32, 32
"""A lane holds 32 experts, one slot and one group."""


def _over_limit(width: int, K: int, router: Router) -> str | None:
    for what, value, most in (
        ("experts", width, MOST_EXPERTS),
        ("slots", K, MOST_SLOTS),
        ("groups", router.groups, MOST_GROUPS),
    ):
        if value > most:
            return f"the CUDA router takes at most {most} {what}, not {value}"
    return None


def unsupported(problem: Problem) -> str | None:
    """Why `route` cannot do this problem's routing, or None."""
    return _over_limit(problem.routed_ids, problem.K, problem.router)


def route(
    logits_TE: torch.Tensor,
    router: Router,
    K: int,
    correction_bias: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    table_ids_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 (T, K'), weights float32 (T, K')), best expert first; K' = K + fused shared slots. See optimized.router.

    logits (T, E + zero experts) in float32, float16 or bfloat16, any strides. Identity experts have no learned factor.
    """
    check_arguments(logits_TE, router, K, correction_bias, expert_scale, table_ids_TK)
    T, width = logits_TE.shape
    over = _over_limit(width, K, router)
    check(over is None, str(over))
    library.check_dtype("logits", logits_TE)
    library.check_tensors(logits=logits_TE, correction_bias=correction_bias, expert_scale=expert_scale, table_ids=table_ids_TK)
    slots = K + router.fused_shared
    ids = torch.empty(T, slots, dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty(T, slots, dtype=torch.float32, device=logits_TE.device)
    if T == 0:
        return ids, weights
    table = table_ids_TK.to(torch.int32) if table_ids_TK is not None else None
    library.call(
        "router", "moeproof_route", logits_TE.device,
        dtype=logits_TE.dtype, logits=logits_TE, stride_t=logits_TE.stride(0), stride_e=logits_TE.stride(1),
        bias=correction_bias.float().contiguous() if correction_bias is not None else None,
        expert_scale=expert_scale.float().contiguous() if expert_scale is not None else None,
        table=table, stride_table_t=table.stride(0) if table is not None else 0,
        stride_table_k=table.stride(1) if table is not None else 0, ids=ids, weights=weights,
        T=T, width=width, E=width - router.zero_experts, K=K, score=SCORES.index(router.score),
        groups=router.groups, keep=router.keep, top2=router.group_score == "top2",
        rejected_zero=router.rejected == "zero", renorm=RENORMS.index(router.renorm), renorm_value=router.renorm_value,
        scale=router.scale, multiplier=router.multiplier, softcap=router.softcap, jitter_eps=router.jitter_eps,
        fused=router.fused_shared,
    )  # fmt: skip
    return ids, weights
