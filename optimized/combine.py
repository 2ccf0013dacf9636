"""COMBINE: weigh and sum a token's slots in float32, scale, add identity and shared terms, round once."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.elementary import sigmoid
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.slots import Slots, load_ids, local_of_id
from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.errors import check


@triton.jit
def _combine(
    y, weights_TK, rows, x_TH, shared_TH, gate_T, out_TH, T, H, scale, num_zero,
    stride_ys, stride_yh, stride_wt, stride_wk, stride_xt, stride_xh, stride_ot, stride_oh,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K: tl.constexpr,
    WEIGHTED: tl.constexpr, SCALED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    real = t < T
    t_wide = t.to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    columns = (h < H)[None, :]
    h_wide = h.to(tl.int64)[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
    zero_weight = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        slot = t * K + k
        expert = load_ids(slot, real, ids, stride_t, stride_k, K)
        if rows is not None:
            row = tl.load(rows + slot, mask=real & (expert >= 0), other=-1)
            live = row >= 0
        else:
            row = slot
            live = local_of_id(expert, expert_map, num_experts, num_local) >= 0
        # Masked by the id, so that the weight and the row of a dead slot may hold anything.
        y_tile = tl.load(
            y + row.to(tl.int64)[:, None] * stride_ys + h_wide * stride_yh, mask=live[:, None] & columns, other=0.0
        ).to(tl.float32)
        at = weights_TK + t_wide * stride_wt + k * stride_wk
        if WEIGHTED:
            y_tile *= tl.load(at, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += y_tile
        if x_TH is not None:
            identity = (expert >= num_experts) & (expert < num_experts + num_zero)
            zero_weight += tl.load(at, mask=identity, other=0.0).to(tl.float32)
    if x_TH is not None:
        x = tl.load(x_TH + t_wide[:, None] * stride_xt + h_wide * stride_xh, mask=real[:, None] & columns, other=0.0)
        # A token without identity slots must not turn an infinite input into NaN.
        acc += tl.where((zero_weight != 0.0)[:, None], zero_weight[:, None] * x.to(tl.float32), 0.0)
    if SCALED:
        acc *= scale
    if shared_TH is not None:
        extra = tl.load(shared_TH + t_wide[:, None] * H + h_wide, mask=real[:, None] & columns, other=0.0)
        if gate_T is not None:
            extra *= sigmoid(tl.load(gate_T + t, mask=real, other=0.0))[:, None]
        acc += extra
    out = out_TH + t_wide[:, None] * stride_ot + h_wide * stride_oh
    tl.store(out, acc.to(out_TH.dtype.element_ty), mask=real[:, None] & columns)


def combine(
    y: torch.Tensor,
    weights_TK: torch.Tensor,
    slots: Slots,
    out_TH: torch.Tensor,
    *,
    weighted: bool = True,
    rows: torch.Tensor | None = None,
    scale: float = 1.0,
    zero_experts: int = 0,
    x_TH: torch.Tensor | None = None,
    shared_TH: torch.Tensor | None = None,
    gate_T: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """out[t] = scale * (sum over live slots of w y + sum over identity slots of w x[t]) + sigmoid(gate[t]) shared[t].

    y (rows, H): row = slot, or rows[slot] where `rows` int32 (S,) is given (-1 = dead). Every row of `out` is written; a
    dead slot contributes exactly 0 whatever its weight and row hold. `weighted` False takes live slots with weight 1.
    shared (T, H) and gate (T,) are contiguous float32. Any strides for the others; out may be x.
    """
    T, H = out_TH.shape
    check(y.dim() == 2 and y.size(1) == H, f"expert output is {tuple(y.shape)}, must be (rows, {H})")
    check(
        weights_TK.shape == slots.ids.shape,
        f"topk_weights is {tuple(weights_TK.shape)}, topk_ids {tuple(slots.ids.shape)}; they must be equal",
    )
    if not out_TH.numel():
        return
    tile = 65536 if interpreted() else 1024
    block_h = min(triton.next_power_of_2(H), 1024)
    block_t = min(max(tile // block_h, 1), triton.next_power_of_2(T))
    x = x_TH if zero_experts else None
    _combine[(triton.cdiv(T, block_t), triton.cdiv(H, block_h))](
        y, weights_TK, rows, x, shared_TH, gate_T, out_TH, T, H, scale, zero_experts,
        *y.stride(), *weights_TK.stride(), *(x.stride() if x is not None else (0, 0)), *out_TH.stride(), *slots.arguments,
        WEIGHTED=weighted, SCALED=scale != 1.0, BLOCK_T=block_t, BLOCK_H=block_h, num_warps=4,
        **launch_options(overlap),
    )  # fmt: skip
