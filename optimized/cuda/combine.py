"""COMBINE in CUDA C++: the twin of optimized.combine."""

from __future__ import annotations

import torch

from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.slots import slot_arguments
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.errors import check


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
) -> None:
    """out[t] = scale * (sum over live slots of w y + sum over identity slots of w x[t]) + sigmoid(gate[t]) shared[t].

    See optimized.combine. y, x and out share a dtype; weights are float32, shared (T, H) and gate (T,) contiguous float32.
    """
    T, H = out_TH.shape
    check(y.dim() == 2 and y.size(1) == H, f"expert output is {tuple(y.shape)}, must be (rows, {H})")
    check(
        weights_TK.shape == slots.ids.shape,
        f"topk_weights is {tuple(weights_TK.shape)}, topk_ids {tuple(slots.ids.shape)}; they must be equal",
    )
    check(weights_TK.dtype == torch.float32, f"topk_weights is {weights_TK.dtype}, must be torch.float32")
    library.check_dtype("expert output", y)
    x = x_TH if zero_experts else None
    check(not zero_experts or x is not None, f"{zero_experts} identity experts need x, which is None")
    for name, tensor in (("out", out_TH), ("x", x)):
        check(tensor is None or tensor.dtype == y.dtype, f"{name} and the expert output ({y.dtype}) must share a dtype")
    for name, tensor, shape in (("shared", shared_TH, (T, H)), ("gate", gate_T, (T,))):
        check(
            tensor is None or (tensor.dtype == torch.float32 and tensor.shape == shape and tensor.is_contiguous()),
            f"{name} must be contiguous float32 {shape}",
        )
    check(
        rows is None or (rows.dtype == torch.int32 and rows.shape == (slots.count,) and rows.is_contiguous()),
        f"rows must be contiguous int32 ({slots.count},)",
    )
    library.check_tensors(
        y=y, topk_weights=weights_TK, topk_ids=slots.ids, expert_map=slots.expert_map, out=out_TH, x=x,
        shared=shared_TH, gate=gate_T, rows=rows,
    )  # fmt: skip
    if not out_TH.numel():
        return
    library.call(
        "combine", "moeproof_combine", y.device,
        dtype=y.dtype, y=y, weights=weights_TK, rows=rows, x=x, shared=shared_TH, gate=gate_T, out=out_TH,
        T=T, H=H, scale=scale, weighted=weighted, num_zero=zero_experts,
        stride_ys=y.stride(0), stride_yh=y.stride(1), stride_wt=weights_TK.stride(0), stride_wk=weights_TK.stride(1),
        stride_xt=x.stride(0) if x is not None else 0, stride_xh=x.stride(1) if x is not None else 0,
        stride_ot=out_TH.stride(0), stride_oh=out_TH.stride(1), **slot_arguments(slots),
    )  # fmt: skip
