"""ACT in CUDA C++: the twin of optimized.activation."""

from __future__ import annotations

import torch

from moeproof.optimized.activation import rows_of
from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.slots import NO_SLOTS, slot_arguments
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check

KINDS = {
    "silu": 0,
    "gelu": 1,
    "gelu_tanh": 2,
    "swigluoai": 3,
    "swigluoai_uninterleave": 3,
    "swiglustep": 4,
    "situ": 5,
    "silu_no_mul": 6,
    "gelu_no_mul": 7,
    "gelu_tanh_no_mul": 8,
    "relu_no_mul": 9,
    "relu2_no_mul": 10,
}
"""Codes of activation.cu."""


def activate(
    x_RN: torch.Tensor,
    h_RI: torch.Tensor,
    act: Activation,
    slots: Slots | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """h (R, I) = act(x (R, N)), rounded once to h's dtype, which is x's. Any strides; x and h must not overlap.

    With `slots`, row = slot and only live slots are computed. With `counts` int32 (e,), rows are e equal regions and only
    the first counts[e] of each are computed. Other rows are neither read nor written.
    """
    R, I = rows_of(x_RN, h_RI, act)  # noqa: E741  (the project's letter)
    check(h_RI.dtype == x_RN.dtype, f"activation output is {h_RI.dtype}, input {x_RN.dtype}; they must be equal")
    library.check_dtype("activation input", x_RN)
    check(slots is None or slots.count == R, f"activation has {R} rows, topk_ids {slots.count if slots else 0} slots")
    check(slots is None or counts is None, "activation takes slots or counts, not both")
    check(
        counts is None or (counts.dtype == torch.int32 and counts.is_contiguous() and R % max(counts.numel(), 1) == 0),
        f"counts must be contiguous int32 (e,), and e must divide {R} rows",
    )
    check(counts is None or R < 2**31, f"{R} rows in regions; at most 2^31 - 1 are supported")
    library.check_tensors(x=x_RN, h=h_RI, counts=counts, topk_ids=slots.ids if slots else None)
    if not h_RI.numel():
        return
    library.call(
        "activation", "moeproof_activate", x_RN.device,
        dtype=x_RN.dtype, x=x_RN, h=h_RI, R=R, I=I, kind=KINDS[act.name], interleaved=bool(act.interleaved),
        alpha=act.alpha or 0.0, beta=act.beta or 0.0, limit=act.limit or 0.0, linear_beta=act.linear_beta or 0.0,
        counts=counts, region=R // counts.numel() if counts is not None else 1,
        stride_xr=x_RN.stride(0), stride_xn=x_RN.stride(1), stride_hr=h_RI.stride(0), stride_hi=h_RI.stride(1),
        **(slot_arguments(slots) if slots is not None else NO_SLOTS),
    )  # fmt: skip
