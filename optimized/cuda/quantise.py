"""QUANT1, and ACT with QUANT2 in one pass, in CUDA C++: codes and scales bit for bit as the scheme table says."""

from __future__ import annotations

import math
import struct

import torch

from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.activation import KINDS
from moeproof.optimized.cuda.slots import NO_SLOTS, slot_arguments
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.schemes import ALL, Quantiser

FORMATS = ("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
RULES = {"amax": 0, "ocp_floor": 2, "round_up": 3}
STATIC = 1
QUOTIENTS = {"divide": 0, "reciprocal": 1, "inverse": 2}
"""Codes of quantise.cu."""
GROUPS = (16, 32, 64, 128)
MOST_BYTES = 48 * 1024
"""Of a group: it waits in shared memory for its scale."""


def unsupported(q: Quantiser) -> str | None:
    """Why these kernels cannot quantise activations by this row of the scheme table, or None."""
    if q.fmt not in FORMATS or q.rule not in RULES or q.quotient not in QUOTIENTS:
        return f"the CUDA quantiser does not know {q.fmt} by rule {q.rule} and quotient {q.quotient}"
    if q.group == (ALL, ALL):
        return None if q.static else "the CUDA quantiser has no amax over a whole tensor"
    if q.group[0] != 1 or q.group[1] not in (ALL, *GROUPS):
        return f"the CUDA quantiser takes rows or groups of {GROUPS} columns of a row, not {q.group}"
    if q.scale != ("fp32" if q.rule == "amax" else "e8m0"):
        return f"the CUDA quantiser stores no {q.scale} scales by rule {q.rule}"
    return None


def quantise(x_RC: torch.Tensor, q: Quantiser, given: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, C), float32, float16 or bfloat16, any strides -> (codes, scales) as stored: q.code_shape and q.scale_shape.

    `given` float32 (1, 1) is the static scale where the row of the table has one, used verbatim.
    """
    check(x_RC.dim() == 2, f"the quantiser takes rows: (R, C), not {tuple(x_RC.shape)}")
    return _launch(x_RC, x_RC.size(1), q, given, None, None, None)


def activate_quantise(
    x_RN: torch.Tensor,
    act: Activation,
    q: Quantiser,
    slots: Slots | None = None,
    given: torch.Tensor | None = None,
    h_RI: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """act(x (R, N)), rounded to x's dtype and then quantised: (codes, scales) of (R, I). Written to h (R, I) too where given.

    With `slots`, row = slot and only live slots are read or written.
    """
    check(x_RN.dim() == 2, f"activation takes rows: (R, N), not {tuple(x_RN.shape)}")
    R, N = x_RN.shape
    I = N // act.width_in(1)  # noqa: E741  (the project's letter)
    check(act.width_in(I) == N, f"activation '{act}' needs an even number of columns, not {N}")
    check(slots is None or slots.count == R, f"activation has {R} rows, topk_ids {slots.count if slots else 0} slots")
    check(
        h_RI is None or (h_RI.shape == (R, I) and h_RI.dtype == x_RN.dtype),
        f"activation output must be {x_RN.dtype} {(R, I)}",
    )
    return _launch(x_RN, I, q, given, act, slots, h_RI)


def _launch(
    x: torch.Tensor, C: int, q: Quantiser, given: torch.Tensor | None, act: Activation | None,
    slots: Slots | None, h: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes and scales of (R, C)."""
    reason = unsupported(q)
    check(reason is None, str(reason))
    q.check_columns("input of the quantiser", C)
    library.check_dtype("input of the quantiser", x)
    check(
        not q.static or (given is not None and given.dtype == torch.float32 and given.numel() == 1),
        f"the static scale of {q.fmt} activations must be float32 (1, 1), and none else was given",
    )
    library.check_tensors(x=x, h=h, scale=given, topk_ids=slots.ids if slots else None)
    R, device = x.size(0), x.device
    group = min(GROUPS[-1] if q.static else q.group[1] or C, max(C, 1))
    check(group * x.element_size() <= MOST_BYTES, f"rows of {C} columns; the CUDA quantiser takes {MOST_BYTES} bytes of a row")
    check(R * math.ceil(C / group) < 2**31 if C else True, f"{R} x {C} elements are too many groups for one launch")
    e8m0 = q.rule != "amax"
    codes = torch.empty(q.code_shape(R, C), dtype=q.format.dtype, device=device)
    if q.static and given is not None:
        scales = given.view(1, 1).clone()
    else:
        scales = torch.empty(q.scale_shape(R, C), dtype=torch.uint8 if e8m0 else torch.float32, device=device)
    if not R * C:
        return codes, scales
    parameters = act or Activation("relu_no_mul")
    library.call(
        "quantise", "moeproof_quantise", device,
        dtype=x.dtype, x=x, h=h, R=R, C=C, activated=act is not None, kind=KINDS[parameters.name],
        interleaved=bool(parameters.interleaved), alpha=parameters.alpha or 0.0, beta=parameters.beta or 0.0,
        limit=parameters.limit or 0.0, linear_beta=parameters.linear_beta or 0.0,
        stride_xr=x.stride(0), stride_xn=x.stride(1),
        stride_hr=h.stride(0) if h is not None else 0, stride_hi=h.stride(1) if h is not None else 0,
        group=group, format=FORMATS.index(q.fmt), rule=STATIC if q.static else RULES[q.rule],
        quotient=QUOTIENTS[q.quotient], top=q.format.max, floor=q.floor, emax=q.format.emax,
        top_bits=_mantissa(q.format.max), given=given, codes=codes, scales=None if e8m0 or q.static else scales,
        exponents=scales if e8m0 else None, code_bytes=codes.size(1), **(slot_arguments(slots) if slots else NO_SLOTS),
    )  # fmt: skip
    return codes, scales


def _mantissa(x: float) -> int:
    """The 23 mantissa bits of x as a float32."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0] & 0x7FFFFF)
