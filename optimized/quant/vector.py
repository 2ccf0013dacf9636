"""The fused fp8 layer for very few tokens, without sorting: each slot multiplies its expert's codes on its own.

Products of decoded codes are taken in float32 outside the tensor cores. Scales of blocks multiply sums of 128 columns, those of
rows and channels the finished sums.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.activation import gated, ungated
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.slots import Slots, local_expert
from moeproof.optimized.vector import Strip
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check

Tensor = torch.Tensor
GROUP = tl.constexpr(128)


@triton.jit
def _by_group(products, row_scale, ws, row, inside, group, groups, stride_sn, stride_sg):
    """float32 (ROWS, groups of a step): sums of 128 products each, times both scales. row_scale (groups,) is the vector's."""
    sums = tl.sum(tl.reshape(products, [products.shape[0], group.shape[0], GROUP]), 2)
    at = ws + (row // GROUP).to(tl.int64)[:, None] * stride_sn + group[None, :] * stride_sg
    return sums * row_scale[None, :] * tl.load(at, mask=inside[:, None] & (group < groups)[None, :], other=0.0)


@triton.jit
def _vector_gate_up(
    x, xs, w, ws, bias_eN, h_SI, I, H,  # noqa: E741  (the project's letter)
    stride_xt, stride_xst, stride_xsg, stride_we, stride_wn, stride_wh, stride_se, stride_sn, stride_sg, stride_be, stride_bn,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    BLOCKED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    slot = tl.program_id(0)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = i < I
    expert = local_expert(slot, True, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    if expert < 0:
        # The next pass quantises every row.
        tl.store(h_SI + slot.to(tl.int64) * I + i, tl.zeros([ROWS], h_SI.dtype.element_ty), mask=inside)
    else:
        token = (slot // K).to(tl.int64)
        x += token * stride_xt
        xs += token * stride_xst
        w += expert.to(tl.int64) * stride_we
        ws += expert.to(tl.int64) * stride_se
        row_g = i if PACKED or not GATED else 2 * i
        row_u = I + i if PACKED else 2 * i + 1
        w_g = w + row_g.to(tl.int64)[:, None] * stride_wn
        w_u = w + row_u.to(tl.int64)[:, None] * stride_wn
        acc_g = tl.zeros([ROWS, STEP // GROUP if BLOCKED else STEP], tl.float32)
        acc_u = acc_g
        groups = tl.cdiv(H, GROUP)
        for first in tl.range(0, H, STEP, num_stages=STAGES):
            k = first + tl.arange(0, STEP)
            real = k < H
            at = k.to(tl.int64)[None, :] * stride_wh
            mask = inside[:, None] if EVEN else inside[:, None] & real[None, :]
            x_k = tl.load(x + k, mask=real, other=0.0).to(tl.float32)[None, :]
            products_g = x_k * tl.load(w_g + at, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                products_u = x_k * tl.load(w_u + at, mask=mask, other=0.0).to(tl.float32)
            if BLOCKED:
                group = first // GROUP + tl.arange(0, STEP // GROUP)
                x_scale = tl.load(xs + group * stride_xsg, mask=group < groups, other=0.0)
                acc_g += _by_group(products_g, x_scale, ws, row_g, inside, group, groups, stride_sn, stride_sg)
                if GATED:
                    acc_u += _by_group(products_u, x_scale, ws, row_u, inside, group, groups, stride_sn, stride_sg)
            else:
                acc_g += products_g
                if GATED:
                    acc_u += products_u
        g = tl.sum(acc_g, 1)
        u = tl.sum(acc_u, 1)
        if not BLOCKED:
            x_scale = tl.load(xs)
            g *= x_scale * tl.load(ws + row_g.to(tl.int64) * stride_sn, mask=inside, other=0.0)
            if GATED:
                u *= x_scale * tl.load(ws + row_u.to(tl.int64) * stride_sn, mask=inside, other=0.0)
        if bias_eN is not None:
            bias = bias_eN + expert.to(tl.int64) * stride_be
            g += tl.load(bias + row_g.to(tl.int64) * stride_bn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + row_u.to(tl.int64) * stride_bn, mask=inside, other=0.0).to(tl.float32)
        h = gated(g, u, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA) if GATED else ungated(g, NAME)
        tl.store(h_SI + slot.to(tl.int64) * I + i, h.to(h_SI.dtype.element_ty), mask=inside)


@triton.jit
def _vector_down(
    h, hs, w, ws, bias_eH, weights_TK, out_TH, I, H, scale,  # noqa: E741  (the project's letter)
    stride_hs, stride_hr, stride_hg, stride_we, stride_wh, stride_wi, stride_se, stride_sn, stride_sg, stride_be, stride_bh,
    stride_weight_t, stride_weight_k, stride_ot, stride_oh,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    BLOCKED: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One loop over the slots of a token and the steps of a product, so that loads never wait for a slot's sum."""
    after_previous(OVERLAP)
    t = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = row < H
    steps = tl.cdiv(I, STEP)
    groups = tl.cdiv(I, GROUP)
    acc = tl.zeros([ROWS, STEP // GROUP if BLOCKED else STEP], tl.float32)
    extra = tl.zeros([ROWS], tl.float32)
    for turn in tl.range(0, K * steps, num_stages=STAGES):
        slot = t * K + turn // steps
        expert = local_expert(slot, True, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        live = expert >= 0
        own = tl.maximum(expert, 0).to(tl.int64)
        factor = tl.full([], 1.0, tl.float32)
        if weights_TK is not None:
            at = weights_TK + t.to(tl.int64) * stride_weight_t + (turn // steps).to(tl.int64) * stride_weight_k
            factor = tl.load(at, mask=live, other=0.0).to(tl.float32)
        k = turn % steps * STEP + tl.arange(0, STEP)
        real = (k < I) & live
        mask = inside[:, None] & live if EVEN else inside[:, None] & real[None, :]
        at_w = w + own * stride_we + row.to(tl.int64)[:, None] * stride_wh + k.to(tl.int64)[None, :] * stride_wi
        w_k = tl.load(at_w, mask=mask, other=0.0).to(tl.float32)
        h_k = tl.load(h + slot.to(tl.int64) * stride_hs + k, mask=real, other=0.0).to(tl.float32)
        at_hs = hs + slot.to(tl.int64) * stride_hr
        if BLOCKED:
            group = turn % steps * (STEP // GROUP) + tl.arange(0, STEP // GROUP)
            h_scale = tl.load(at_hs + group * stride_hg, mask=(group < groups) & live, other=0.0)
            own_scale = ws + own * stride_se
            acc += _by_group(
                h_k[None, :] * w_k, factor * h_scale, own_scale, row, inside & live, group, groups, stride_sn, stride_sg
            )
        else:
            channel = tl.load(ws + own * stride_se + row.to(tl.int64) * stride_sn, mask=inside & live, other=0.0)
            acc += ((factor * tl.load(at_hs)) * channel)[:, None] * (h_k[None, :] * w_k)
        if bias_eH is not None:
            at_b = bias_eH + own * stride_be + row.to(tl.int64) * stride_bh
            extra += factor * tl.load(at_b, mask=inside & live & (turn % steps == 0), other=0.0).to(tl.float32)
    total = (tl.sum(acc, 1) + extra) * scale
    at_out = out_TH + t.to(tl.int64) * stride_ot + row.to(tl.int64) * stride_oh
    tl.store(at_out, total.to(out_TH.dtype.element_ty), mask=inside)


def _blocked(w_scale: Tensor, rows: int, strip: Strip) -> bool:
    """Whether scales are of blocks."""
    blocked = w_scale.size(1) != rows or w_scale.size(2) > 1
    check(not blocked or strip.step % 128 == 0, f"strip {strip}: with blocks of 128 a step is a multiple of 128 columns")
    return blocked


def vector_gate_up_act(
    x: tuple[Tensor, Tensor],
    w1: tuple[Tensor, Tensor],
    h_SI: Tensor,
    slots: Slots,
    strip: Strip,
    act: Activation,
    b1_eN: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """h[slot] = act(x[slot // K] @ w1[expert].T (+ b1)) of live slots, zeros for dead ones. x and w1 are codes and scales; h,
    and the codes of x, are contiguous."""
    (codes, scales), (w, ws) = x, w1
    I, H = h_SI.size(1), codes.size(1)  # noqa: E741  (the project's letter)
    _vector_gate_up[(slots.count, triton.cdiv(I, strip.rows))](
        codes, scales, w, ws, b1_eN, h_SI, I, H, codes.stride(0), *scales.stride(), *w.stride(), *ws.stride(),
        *(b1_eN.stride() if b1_eN is not None else (0, 0)), *slots.arguments,
        NAME=act.name, GATED=act.gated, PACKED=not act.interleaved,
        ALPHA=act.alpha or 0.0, BETA=act.beta or 0.0, LIMIT=act.limit or 0.0, LINEAR_BETA=act.linear_beta or 0.0,
        BLOCKED=_blocked(ws, w.size(1), strip),
        ROWS=strip.rows, STEP=strip.step, STAGES=strip.stages, EVEN=H % strip.step == 0, num_warps=strip.warps,
        **launch_options(overlap),
    )  # fmt: skip


def vector_down(
    h: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    out_TH: Tensor,
    weights_TK: Tensor | None,
    slots: Slots,
    strip: Strip,
    b2_eH: Tensor | None = None,
    scale: float = 1.0,
    overlap: bool = False,
) -> None:
    """out[t] = scale * sum over live slots of weight * (h[slot] @ w2[expert].T (+ b2)). Every row of `out` is written."""
    (codes, scales), (w, ws) = h, w2
    (T, H), I = out_TH.shape, codes.size(1)  # noqa: E741  (the project's letter)
    _vector_down[(T, triton.cdiv(H, strip.rows))](
        codes, scales, w, ws, b2_eH, weights_TK, out_TH, I, H, scale, codes.stride(0), *scales.stride(), *w.stride(),
        *ws.stride(), *(b2_eH.stride() if b2_eH is not None else (0, 0)),
        *(weights_TK.stride() if weights_TK is not None else (0, 0)), *out_TH.stride(), *slots.arguments,
        BLOCKED=_blocked(ws, H, strip),
        ROWS=strip.rows, STEP=strip.step, STAGES=strip.stages, EVEN=I % strip.step == 0, num_warps=strip.warps,
        **launch_options(overlap),
    )  # fmt: skip
