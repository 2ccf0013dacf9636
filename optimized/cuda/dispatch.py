"""DISPATCH on one rank in CUDA C++: the twin of optimized.dispatch, and of slots.clear_dead."""

from __future__ import annotations

import torch

from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.slots import slot_arguments
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.errors import check


def move_rows(
    x_TH: torch.Tensor,
    out: torch.Tensor,
    K: int,
    rows: torch.Tensor | None = None,
    weights_TK: torch.Tensor | None = None,
) -> None:
    """out[row of slot] = x[slot // K], times its weight rounded once to the dtype where weights are given.

    `rows` int32 (T * K,), -1 = leave out; None: row = slot. Rows of `out` that no slot names are not written.
    """
    T, H = x_TH.shape
    check(out.dim() == 2 and out.size(1) == H, f"dispatch output is {tuple(out.shape)}, must be (rows, {H})")
    check(out.dtype == x_TH.dtype, f"dispatch output is {out.dtype}, input {x_TH.dtype}; they must be equal")
    check(T * K < 2**31, f"{T * K} slots; at most 2^31 - 1 are supported")
    check(
        rows is None or (rows.dtype == torch.int32 and rows.shape == (T * K,) and rows.is_contiguous()),
        f"rows must be contiguous int32 ({T * K},)",
    )
    check(
        weights_TK is None or (weights_TK.dtype == torch.float32 and weights_TK.shape == (T, K)),
        f"weights must be float32 {(T, K)}",
    )
    library.check_dtype("dispatch input", x_TH)
    library.check_tensors(x=x_TH, out=out, rows=rows, weights=weights_TK)
    if not T * K * H:
        return
    stride_wt, stride_wk = weights_TK.stride() if weights_TK is not None else (0, 0)
    library.call(
        "dispatch", "moeproof_move", x_TH.device,
        dtype=x_TH.dtype, x=x_TH, weights=weights_TK, rows=rows, out=out, T=T, H=H, K=K,
        stride_xt=x_TH.stride(0), stride_xh=x_TH.stride(1), stride_wt=stride_wt, stride_wk=stride_wk,
        stride_or=out.stride(0), stride_oh=out.stride(1),
    )  # fmt: skip


def weigh_input(x_TH: torch.Tensor, weights_T1: torch.Tensor) -> torch.Tensor:
    """(T, H): x times its token's weight, rounded once to the dtype, as a new tensor. One slot per token only."""
    check(
        weights_T1.shape == (x_TH.size(0), 1),
        f"the router weight can be on the input only with one slot per token; topk_weights is {tuple(weights_T1.shape)}",
    )
    out = torch.empty(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    move_rows(x_TH, out, 1, weights_TK=weights_T1)
    return out


def weighted_rows(x_TH: torch.Tensor, weights_T1: torch.Tensor, ids_T1: torch.Tensor) -> torch.Tensor:
    """(T, H): as weigh_input, and zeros in rows that are not routed. The twin of optimized.quant.prepare.weighted_rows."""
    check(
        ids_T1.size(1) == 1,
        f"apply_router_weight_on_input with topk={ids_T1.size(1)}: allowed only for one slot per token",
    )
    out = torch.zeros(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    place = torch.arange(x_TH.size(0), dtype=torch.int32, device=x_TH.device)
    move_rows(x_TH, out, 1, rows=torch.where(ids_T1.flatten() >= 0, place, -1), weights_TK=weights_T1)
    return out


def clear_dead(y_SH: torch.Tensor, slots: Slots) -> None:
    """Write zeros into the rows (S, H) of dead slots; live rows are not touched."""
    check(y_SH.dim() == 2 and y_SH.size(0) == slots.count, f"rows to clear are {tuple(y_SH.shape)}, slots {slots.count}")
    library.check_dtype("rows to clear", y_SH)
    library.check_tensors(y=y_SH, topk_ids=slots.ids, expert_map=slots.expert_map)
    if not y_SH.numel():
        return
    library.call(
        "dispatch", "moeproof_clear", y_SH.device,
        dtype=y_SH.dtype, y=y_SH, S=slots.count, H=y_SH.size(1), stride_ys=y_SH.stride(0), stride_yh=y_SH.stride(1),
        **slot_arguments(slots),
    )  # fmt: skip
