"""DISPATCH on one rank: bring each slot's row to its place, weighted and rounded where the weight is on the input."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.errors import check


@triton.jit
def _move(
    x_TH, weights_TK, rows, out, num_slots, H, K,
    stride_xt, stride_xh, stride_wt, stride_wk, stride_or, stride_oh,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    live = slot < num_slots
    row = slot
    if rows is not None:
        row = tl.load(rows + slot, mask=live, other=-1)
        live = row >= 0
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask = live[:, None] & (h < H)[None, :]
    h = h.to(tl.int64)[None, :]
    token = (slot // K).to(tl.int64)
    x = tl.load(x_TH + token[:, None] * stride_xt + h * stride_xh, mask=mask, other=0.0)
    if weights_TK is not None:
        w = tl.load(weights_TK + token * stride_wt + (slot % K).to(tl.int64) * stride_wk, mask=live, other=0.0)
        x = (x.to(tl.float32) * w.to(tl.float32)[:, None]).to(x_TH.dtype.element_ty)
    tl.store(out + row.to(tl.int64)[:, None] * stride_or + h * stride_oh, x, mask=mask)


def move_rows(
    x_TH: torch.Tensor,
    out: torch.Tensor,
    K: int,
    rows: torch.Tensor | None = None,
    weights_TK: torch.Tensor | None = None,
) -> None:
    """out[row of slot] = x[slot // K], times its weight where weights are given: a float32 product rounded to the dtype.

    `rows` int32 (T * K,), -1 = leave out; None: row = slot. Rows of `out` that no slot names are not written.
    """
    T, H = x_TH.shape
    check(out.dim() == 2 and out.size(1) == H, f"dispatch output is {tuple(out.shape)}, must be (rows, {H})")
    check(out.dtype == x_TH.dtype, f"dispatch output is {out.dtype}, input {x_TH.dtype}; they must be equal")
    if not T * K:
        return
    tile = 65536 if interpreted() else 2048
    block_h = min(triton.next_power_of_2(H), 1024)
    block_s = min(max(tile // block_h, 1), triton.next_power_of_2(T * K))
    strides = weights_TK.stride() if weights_TK is not None else (0, 0)
    _move[(triton.cdiv(T * K, block_s), triton.cdiv(H, block_h))](
        x_TH, weights_TK, rows, out, T * K, H, K, *x_TH.stride(), *strides, *out.stride(),
        BLOCK_S=block_s, BLOCK_H=block_h, num_warps=4,
    )  # fmt: skip


def weigh_input(x_TH: torch.Tensor, weights_T1: torch.Tensor) -> torch.Tensor:
    """(T, H): x times its token's weight, a float32 product rounded to the dtype, as a new tensor. One slot per token only."""
    check(
        weights_T1.shape == (x_TH.size(0), 1),
        f"the router weight can be on the input only with one slot per token; topk_weights is {tuple(weights_T1.shape)}",
    )
    out = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    move_rows(x_TH, out, 1, weights_TK=weights_T1)
    return out
