"""A layer for very few tokens, without sorting: each slot multiplies its expert's weights on its own, in two launches.

With one row an expert, tiles of 16 rows waste 15 of them, and the sort costs as much as a GEMM. Products are taken in
float32 outside the tensor cores; an expert that two tokens name is read twice.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeproof.optimized.activation import gated, ungated
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.slots import Slots, local_expert
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check


@dataclass(frozen=True)
class Strip:
    """One program computes `rows` output columns in steps of `step` along the product."""

    rows: int
    step: int
    warps: int = 4
    stages: int = 1
    """Depth of the software pipeline; 1 leaves overlap to the other programs on the multiprocessor."""

    def __str__(self) -> str:
        """`v8x512-w4-s1`; `parse` reads it back."""
        return f"v{self.rows}x{self.step}-w{self.warps}-s{self.stages}"

    @classmethod
    def parse(cls, text: str) -> Strip:
        found = re.fullmatch(r"v(\d+)x(\d+)-w(\d+)-s(\d+)", text)
        check(found is not None, f"'{text}' is no strip; strips look like {cls(8, 512)}")
        assert found is not None
        return cls(*(int(n) for n in found.groups()))


@triton.jit
def _vector_gate_up(
    x_TH, w, bias_eN, h_SI, I, H,  # noqa: E741  (the project's letter)
    stride_xt, stride_xh, stride_we, stride_wn, stride_wh, stride_be, stride_bn,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    slot = tl.program_id(0)
    expert = local_expert(slot, True, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    if expert >= 0:
        i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        inside = i < I
        row_g = i if PACKED or not GATED else 2 * i
        row_u = I + i if PACKED else 2 * i + 1
        base = w + expert.to(tl.int64) * stride_we
        w_g = base + row_g.to(tl.int64)[:, None] * stride_wn
        w_u = base + row_u.to(tl.int64)[:, None] * stride_wn
        x = x_TH + (slot // K).to(tl.int64) * stride_xt
        acc_g = tl.zeros([ROWS, STEP], tl.float32)
        acc_u = tl.zeros([ROWS, STEP], tl.float32)
        for first in tl.range(0, H, STEP, num_stages=STAGES):
            k = first + tl.arange(0, STEP)
            real = k < H
            at = k.to(tl.int64)[None, :] * stride_wh
            mask = inside[:, None] if EVEN else inside[:, None] & real[None, :]
            x_k = tl.load(x + k.to(tl.int64) * stride_xh, mask=real, other=0.0).to(tl.float32)[None, :]
            acc_g += x_k * tl.load(w_g + at, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                acc_u += x_k * tl.load(w_u + at, mask=mask, other=0.0).to(tl.float32)
        g = tl.sum(acc_g, 1)
        u = tl.sum(acc_u, 1)
        if bias_eN is not None:
            bias = bias_eN + expert.to(tl.int64) * stride_be
            g += tl.load(bias + row_g.to(tl.int64) * stride_bn, mask=inside, other=0.0).to(tl.float32)
            if GATED:
                u += tl.load(bias + row_u.to(tl.int64) * stride_bn, mask=inside, other=0.0).to(tl.float32)
        h = gated(g, u, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA) if GATED else ungated(g, NAME)
        tl.store(h_SI + slot.to(tl.int64) * I + i, h.to(h_SI.dtype.element_ty), mask=inside)


@triton.jit
def _vector_down(
    h_SI, w, bias_eH, weights_TK, out_TH, I, H, scale,  # noqa: E741  (the project's letter)
    stride_we, stride_wh, stride_wi, stride_be, stride_bh, stride_weight_t, stride_weight_k, stride_ot, stride_oh,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    WEIGHTED: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One loop over the slots of a token and the steps of a product, so that loads never wait for a slot's sum."""
    after_previous(OVERLAP)
    t = tl.program_id(0)
    h = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = h < H
    steps = tl.cdiv(I, STEP)
    acc = tl.zeros([ROWS, STEP], tl.float32)
    extra = tl.zeros([ROWS], tl.float32)
    for turn in tl.range(0, K * steps, num_stages=STAGES):
        k = turn // steps
        slot = t * K + k
        expert = local_expert(slot, True, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        live = expert >= 0
        weight = tl.full([], 1.0, tl.float32)
        if WEIGHTED:
            at = weights_TK + t.to(tl.int64) * stride_weight_t + k.to(tl.int64) * stride_weight_k
            weight = tl.load(at, mask=live, other=0.0).to(tl.float32)
        i = turn % steps * STEP + tl.arange(0, STEP)
        real = (i < I) & live
        own = w + tl.maximum(expert, 0).to(tl.int64) * stride_we
        mask = inside[:, None] & live if EVEN else inside[:, None] & real[None, :]
        w_tile = tl.load(
            own + h.to(tl.int64)[:, None] * stride_wh + i.to(tl.int64)[None, :] * stride_wi, mask=mask, other=0.0
        ).to(tl.float32)
        h_i = tl.load(h_SI + slot.to(tl.int64) * I + i, mask=real, other=0.0).to(tl.float32)
        acc += (weight * h_i)[None, :] * w_tile
        if bias_eH is not None:
            at_b = bias_eH + tl.maximum(expert, 0).to(tl.int64) * stride_be + h.to(tl.int64) * stride_bh
            extra += weight * tl.load(at_b, mask=inside & live & (turn % steps == 0), other=0.0).to(tl.float32)
    total = (tl.sum(acc, 1) + extra) * scale
    at_out = out_TH + t.to(tl.int64) * stride_ot + h.to(tl.int64) * stride_oh
    tl.store(at_out, total.to(out_TH.dtype.element_ty), mask=inside)


def vector_gate_up_act(
    x_TH: torch.Tensor,
    w1_eNH: torch.Tensor,
    h_SI: torch.Tensor,
    slots: Slots,
    strip: Strip,
    act: Activation,
    b1_eN: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """h[slot] = act(x[slot // K] @ w1[expert].T (+ b1)) of live slots; other rows are not touched. h is contiguous."""
    I, H = h_SI.size(1), x_TH.size(1)  # noqa: E741  (the project's letter)
    _vector_gate_up[(slots.count, triton.cdiv(I, strip.rows))](
        x_TH, w1_eNH, b1_eN, h_SI, I, H, *x_TH.stride(), *w1_eNH.stride(), *(b1_eN.stride() if b1_eN is not None else (0, 0)),
        *slots.arguments, NAME=act.name, GATED=act.gated, PACKED=not act.interleaved,
        ALPHA=act.alpha or 0.0, BETA=act.beta or 0.0, LIMIT=act.limit or 0.0, LINEAR_BETA=act.linear_beta or 0.0,
        ROWS=strip.rows, STEP=strip.step, STAGES=strip.stages, EVEN=H % strip.step == 0, num_warps=strip.warps,
        **launch_options(overlap, first=True),
    )  # fmt: skip


def vector_down(
    h_SI: torch.Tensor,
    w2_eHI: torch.Tensor,
    out_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    slots: Slots,
    strip: Strip,
    b2_eH: torch.Tensor | None = None,
    weighted: bool = True,
    scale: float = 1.0,
    overlap: bool = False,
) -> None:
    """out[t] = scale * sum over live slots of weight * (h[slot] @ w2[expert].T (+ b2)). Every row of `out` is written."""
    (T, H), I = out_TH.shape, h_SI.size(1)  # noqa: E741  (the project's letter)
    _vector_down[(T, triton.cdiv(H, strip.rows))](
        h_SI, w2_eHI, b2_eH, weights_TK, out_TH, I, H, scale,
        *w2_eHI.stride(), *(b2_eH.stride() if b2_eH is not None else (0, 0)), *weights_TK.stride(), *out_TH.stride(),
        *slots.arguments, WEIGHTED=weighted,
        ROWS=strip.rows, STEP=strip.step, STAGES=strip.stages, EVEN=I % strip.step == 0, num_warps=strip.warps,
        **launch_options(overlap),
    )  # fmt: skip
