"""ROUTE: logits to ids and weights in one launch. Total: NaN and infinite logits give the contract's defined rows."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.elementary import exp_of_negative, sigmoid, softplus, tanh
from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

NEG_INF = tl.constexpr(float("-inf"))
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
NONE = tl.constexpr(2**30)
"""No expert: above every id."""
TINY = tl.constexpr(1e-37)
SCORES, WARPS = 128, 1
"""Of a program: how many scores it holds, and its warps."""


@triton.jit
def _best(x):
    """(BT,): largest of (BT, GP, SP)."""
    return tl.max(tl.max(x, 2), 1)


@triton.jit
def _total(x):
    return tl.sum(tl.sum(x, 2), 1)


@triton.jit
def _or_zero(best):
    """The maximum to subtract before exp: 0 where nothing is finite."""
    return tl.where(best == NEG_INF, 0.0, best)


@triton.jit
def _logits(at, mask, multiplier, SOFTCAP: tl.constexpr):
    """Float32 logits after multiplier and soft cap: NaN counts as -inf, +inf as the largest float32; -inf where masked."""
    x = tl.load(at, mask=mask, other=NEG_INF).to(tl.float32)
    x = tl.where(x != x, NEG_INF, tl.where(x > FLOAT32_MAX, FLOAT32_MAX, x)) * multiplier
    if SOFTCAP > 0:
        x = SOFTCAP * tanh(x / SOFTCAP)
    return tl.where(mask, tl.where(x > FLOAT32_MAX, FLOAT32_MAX, x), NEG_INF)


@triton.jit
def _scores(x, SCORE: tl.constexpr):
    """Scores of logits (BT, GP, SP); exactly 0 where the logit is -inf. The scores that select by logit return it."""
    if SCORE == "softmax":
        e = exp_of_negative(x - _or_zero(_best(x))[:, None, None])
        x = tl.div_rn(e, tl.maximum(_total(e), TINY)[:, None, None])
    elif SCORE == "sigmoid":
        x = sigmoid(x)
    elif SCORE == "sqrtsoftplus":
        x = tl.sqrt_rn(softplus(x))
    return x


@triton.jit
def _kept_groups(choice, GROUPS: tl.constexpr, KEEP: tl.constexpr, TOP2: tl.constexpr, BT: tl.constexpr, GP: tl.constexpr):
    """bool (BT, GP): the KEEP groups with the best score, ties to the lowest group."""
    SP: tl.constexpr = choice.shape[2]
    group = tl.arange(0, GP)[None, :]
    score = tl.max(choice, 2)
    if TOP2:
        inside = tl.arange(0, SP)[None, None, :]
        first = tl.min(tl.where(choice == score[:, :, None], inside, SP), 2)
        score += tl.max(tl.where(inside == first[:, :, None], NEG_INF, choice), 2)
    open_groups = (group < GROUPS) & (tl.zeros([BT, GP], tl.int32) == 0)
    kept = open_groups & (group < 0)
    for _ in range(KEEP):
        best = tl.max(tl.where(open_groups, score, NEG_INF), 1)
        pick = tl.min(tl.where(open_groups & (score == best[:, None]), group, NONE), 1)
        kept = kept | (group == pick[:, None])
        open_groups = open_groups & (group != pick[:, None])
    return kept


@triton.jit
def _sparsemixer_weight(x, rest, best, jitter_eps):
    """Softmax at the best of `rest` over what is not far below it."""
    best = _or_zero(best)[:, None, None]
    far = best - x > 2 * jitter_eps * tl.maximum(tl.abs(x), best)
    e = tl.where(far | (rest == NEG_INF), 0.0, exp_of_negative(rest - best))
    return tl.div_rn(1.0, tl.maximum(_total(e), 1.0))


@triton.jit
def _norm(w, RENORM: tl.constexpr, value: tl.constexpr):
    """(BT,): what weights (BT, KP) are divided by."""
    if RENORM == "lp":
        # Relative to the largest, so that no power overflows.
        largest = tl.max(tl.abs(w), 1)
        ratio = tl.div_rn(tl.abs(w), tl.maximum(largest, TINY)[:, None])
        powers = tl.where(ratio > 0, tl.exp2(value * tl.log2(tl.where(ratio > 0, ratio, 1.0))), 0.0)
        total = tl.maximum(tl.sum(powers, 1), TINY)
        norm = tl.maximum(largest * tl.exp2(tl.log2(total) / value), 1e-20)
    elif RENORM == "eps":
        norm = tl.sum(w, 1) + value
    else:
        norm = tl.maximum(tl.sum(w, 1), value if RENORM == "floor" else 1e-20)
    return norm


@triton.jit
def _ordered(choice):
    """int32 that order as float32 do, above -2^31: a warp finds the largest integer in one instruction."""
    bits = tl.where(choice == 0.0, 0.0, choice).to(tl.int32, bitcast=True)
    # Magnitudes of negative numbers order the other way round.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _route(
    logits_TE, correction_bias, table_TK, expert_scale, ids_out, weights_out, T, E,
    stride_t, stride_e, stride_table_t, stride_table_k, multiplier, scale,
    WIDTH: tl.constexpr, K: tl.constexpr, SCORE: tl.constexpr, GROUPS: tl.constexpr, KEEP: tl.constexpr,
    TOP2: tl.constexpr, REJECTED_ZERO: tl.constexpr, RENORM: tl.constexpr, RENORM_VALUE: tl.constexpr,
    SOFTCAP: tl.constexpr, JITTER_EPS: tl.constexpr, FUSED: tl.constexpr,
    BT: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """A program routes BT tokens. Experts lie in a (GP, SP) tile: group g's members in row g, both padded to 2^n."""
    G: tl.constexpr = GROUPS if GROUPS > 0 else 1
    SIZE: tl.constexpr = WIDTH // G
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    real = t < T
    t = t.to(tl.int64)
    g = tl.arange(0, GP)[:, None]
    s = tl.arange(0, SP)[None, :]
    exists = (g < G) & (s < SIZE)
    expert = tl.where(exists, g * SIZE + s, NONE)
    at = logits_TE + t[:, None, None] * stride_t + expert.to(tl.int64)[None, :, :] * stride_e
    # A row past the end is routed as if it had no finite logit, and never stored.
    x = _logits(at, real[:, None, None] & exists[None, :, :], multiplier, SOFTCAP)
    score = _scores(x, SCORE)
    choice = score
    if correction_bias is not None:
        choice += tl.load(correction_bias + expert, mask=exists, other=0.0).to(tl.float32)[None, :, :]
    choice = tl.where(x == NEG_INF, NEG_INF, choice)
    if KEEP > 0 and KEEP < GROUPS:
        kept = _kept_groups(choice, GROUPS, KEEP, TOP2, BT, GP)[:, :, None]
        choice = tl.where(kept | (x == NEG_INF), choice, 0.0 if REJECTED_ZERO else NEG_INF)

    column = tl.arange(0, KP)[None, :]
    ids = tl.zeros([BT, KP], tl.int32)
    weights = tl.zeros([BT, KP], tl.float32)
    lowest = tl.full([], -(2**31), tl.int32)
    keys = tl.where(exists[None, :, :], _ordered(choice), lowest)
    used = tl.zeros([BT, GP], tl.int32)
    for k in tl.static_range(K):
        hit = keys == tl.max(tl.max(keys, 2), 1)[:, None, None]
        pick = tl.min(tl.min(tl.where(hit, expert[None, :, :], NONE), 2), 1)
        if table_TK is not None:
            pick = tl.load(table_TK + t * stride_table_t + k * stride_table_k, mask=real, other=0).to(tl.int32)
        here = expert[None, :, :] == pick[:, None, None]
        if SCORE == "sparsemixer":
            rest = tl.where(keys == lowest, NEG_INF, choice)
            best = _best(rest)
            weight = tl.where(best == NEG_INF, 0.0, _sparsemixer_weight(x, rest, best, JITTER_EPS))
            weights = tl.where(column == k, weight[:, None], weights)
        ids = tl.where(column == k, pick[:, None], ids)
        keys = tl.where(here, lowest, keys)
        if GROUPS > 0 and KEEP == 0:
            # A fixed quota from every group: a group that has given its share is closed.
            used += tl.max(here.to(tl.int32), 2)
            keys = tl.where((used >= K // GROUPS)[:, :, None], lowest, keys)

    routed = column < K
    if SCORE != "sparsemixer":
        # A table may name no expert.
        known = routed & (ids >= 0) & (ids < WIDTH)
        place = tl.where(known, ids // SIZE * SP + ids % SIZE, 0)
        weights = tl.where(known, tl.gather(tl.reshape(score, [BT, GP * SP]), place, 1), 0.0)
    if SCORE == "softmax_topk":
        weights = tl.where(routed, weights, NEG_INF)
        weights = exp_of_negative(weights - _or_zero(tl.max(weights, 1))[:, None])
        weights = tl.div_rn(weights, tl.maximum(tl.sum(weights, 1), TINY)[:, None])
    if RENORM != "none":
        weights = tl.div_rn(weights, _norm(weights, RENORM, RENORM_VALUE)[:, None])
    weights *= scale
    if expert_scale is not None:
        known = routed & (ids >= 0) & (ids < E)
        weights *= tl.load(expert_scale + ids, mask=known, other=0.0).to(tl.float32)
    # Fused shared experts: ids after the routed ones, weight 1, never scaled.
    ids = tl.where(routed, ids, E + column - K)
    weights = tl.where(routed, weights, 1.0)
    out = t[:, None] * (K + FUSED) + column
    mask = real[:, None] & (column < K + FUSED)
    tl.store(ids_out + out, ids, mask=mask)
    tl.store(weights_out + out, weights, mask=mask)


def unsupported(problem: Problem) -> str | None:
    """Why `route` cannot do this problem's routing, or None."""
    if problem.router.expert_scale and problem.router.zero_experts:
        return "expert_scale with zero experts: a learned factor for identity experts is not defined"
    return None


def check_arguments(
    logits_TE: torch.Tensor,
    router: Router,
    K: int,
    correction_bias: torch.Tensor | None,
    expert_scale: torch.Tensor | None,
    table_ids_TK: torch.Tensor | None,
) -> None:
    """Refuse tensors that the router does not have, lacks, or has in another shape. Looks at no value."""
    T, width = logits_TE.shape
    E = width - router.zero_experts
    for name, tensor, needed, shape in (
        ("correction_bias", correction_bias, router.bias, (width,)),
        ("expert_scale", expert_scale, router.expert_scale, (E,)),
        ("table_ids", table_ids_TK, router.table, (T, K)),
    ):
        check(needed == (tensor is not None), f"{name} must be given exactly where the router has it ('{router}')")
        check(tensor is None or tensor.shape == shape, f"{name} must be {shape}")
    check(router.table or width >= K, f"K={K} slots but only {width} experts")
    if router.groups:
        size = width // router.groups
        check(size * router.groups == width, f"{width} experts do not divide into {router.groups} groups")
        check(router.keep > 0 or K % router.groups == 0, f"a quota from every group needs K={K} divisible by {router.groups}")
        check(size * (router.keep or router.groups) >= K, f"K={K} slots but only {size * router.keep} experts in kept groups")


def route(
    logits_TE: torch.Tensor,
    router: Router,
    K: int,
    correction_bias: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    table_ids_TK: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids int32 (T, K'), weights float32 (T, K')), best expert first; K' = K + fused shared slots.

    logits (T, E + zero experts), any float dtype and strides. A tie goes to the lowest id. NaN counts as -inf and is chosen
    last; ids of a row are distinct (unless a table repeats them); a row without a finite logit gets the lowest ids and
    weights 0.
    """
    check_arguments(logits_TE, router, K, correction_bias, expert_scale, table_ids_TK)
    T, width = logits_TE.shape
    E = width - router.zero_experts
    slots = K + router.fused_shared
    ids = torch.empty(T, slots, dtype=torch.int32, device=logits_TE.device)
    weights = torch.empty(T, slots, dtype=torch.float32, device=logits_TE.device)
    if T == 0:
        return ids, weights
    groups = max(router.groups, 1)
    gp, sp = triton.next_power_of_2(groups), triton.next_power_of_2(width // groups)
    bt = min(max((32768 if interpreted() else SCORES) // (gp * sp), 1), triton.next_power_of_2(T))
    table_strides = table_ids_TK.stride() if table_ids_TK is not None else (0, 0)
    _route[(triton.cdiv(T, bt),)](
        logits_TE,
        correction_bias.contiguous() if correction_bias is not None else None,
        table_ids_TK,
        expert_scale.contiguous() if expert_scale is not None else None,
        ids, weights, T, E, *logits_TE.stride(), *table_strides, router.multiplier, router.scale,
        WIDTH=width, K=K, SCORE=router.score, GROUPS=router.groups, KEEP=router.keep,
        TOP2=router.group_score == "top2", REJECTED_ZERO=router.rejected == "zero",
        RENORM=router.renorm, RENORM_VALUE=router.renorm_value, SOFTCAP=router.softcap, JITTER_EPS=router.jitter_eps,
        FUSED=router.fused_shared, BT=bt, GP=gp, SP=sp, KP=triton.next_power_of_2(slots), num_warps=WARPS,
    )  # fmt: skip
    return ids, weights
