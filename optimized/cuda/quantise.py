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
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.schemes import ALL, Quantiser

FORMATS = ("e4m3fn", "e5m2", "e3m2", "e2m3", "e2m1", "int8")
RULES = {"amax": 0, "ocp_floor": 2, "round_up": 3}
STATIC = 1
QUOTIENTS = {"divide": 0, "reciprocal": 1, "inverse": 2}
"""Codes of quantise.cu."""
GROUPS = (16, 32, 64, 128)
MOST_BYTES = 64 * 1024
"""Of a group: it waits for its scale in the registers of a block."""


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


def quantise(
    x_RC: torch.Tensor,
    q: Quantiser,
    dtype: Format,
    given: torch.Tensor | None = None,
    *,
    act: Activation | None = None,
    slots: Slots | None = None,
    counts: torch.Tensor | None = None,
    h_RI: torch.Tensor | None = None,
    into: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of x (R, C), or of its activation rounded to x's dtype: q.code_shape and q.scale_shape, as stored.

    x is float32, float16 or bfloat16, of any strides. `given` float32 (1, 1) is the static scale where q has one, returned as
    it is. With `slots` row = slot and only live slots are read or written; with `counts` (e,) the first counts[e] rows of e
    equal regions. `h_RI` receives the activation. `into` are contiguous buffers for the result. See optimized.quant.quantise.
    """
    reason = unsupported(q)
    check(reason is None, str(reason))
    check(x_RC.dim() == 2, f"the quantiser takes rows: (R, C), not {tuple(x_RC.shape)}")
    R, C = x_RC.shape
    if act is not None:
        C //= act.width_in(1)
        check(act.width_in(C) == x_RC.size(1), f"activation '{act}' needs an even number of columns, not {x_RC.size(1)}")
    _check(x_RC, (R, C), q, given, slots, counts, h_RI)
    codes, scales = into or (
        torch.empty(q.code_shape(R, C), dtype=q.format.dtype, device=x_RC.device),
        torch.empty(q.scale_shape(R, C), dtype=q.scale_format(dtype).dtype, device=x_RC.device),
    )
    if q.static:
        assert given is not None
        scales = given
    if R * C:
        _launch(x_RC, C, q, given, act, slots, counts, h_RI, codes, scales)
    return codes, scales


def _check(
    x: torch.Tensor, shape: tuple[int, int], q: Quantiser, given: torch.Tensor | None,
    slots: Slots | None, counts: torch.Tensor | None, h: torch.Tensor | None,
) -> None:  # fmt: skip
    R, C = shape
    q.check_columns("input of the quantiser", C)
    library.check_dtype("input of the quantiser", x)
    check(
        not q.static or (given is not None and given.dtype == torch.float32 and given.numel() == 1),
        f"the static scale of {q.fmt} activations must be float32 (1, 1), and none else was given",
    )
    check(slots is None or slots.count == R, f"the quantiser has {R} rows, topk_ids {slots.count if slots else 0} slots")
    check(slots is None or counts is None, "the quantiser takes slots or counts, not both")
    check(
        counts is None or (counts.dtype == torch.int32 and counts.is_contiguous() and R % max(counts.numel(), 1) == 0),
        f"counts must be contiguous int32 (e,), and e must divide {R} rows",
    )
    check(h is None or (h.shape == shape and h.dtype == x.dtype), f"activation output must be {x.dtype} {shape}")
    library.check_tensors(x=x, h=h, scale=given, counts=counts, topk_ids=slots.ids if slots else None)
    group = _group(q, C)
    check(group * x.element_size() <= MOST_BYTES, f"rows of {C} columns; the CUDA quantiser takes {MOST_BYTES} bytes of a row")
    check(R * math.ceil(C / group) < 2**31, f"{R} x {C} elements are too many groups for one launch")


def _group(q: Quantiser, C: int) -> int:
    """Columns that a team of lanes takes: those of a scale, or any number where the scale is known."""
    return min(GROUPS[-1] if q.static else q.group[1] or C, max(C, 1))


def _launch(
    x: torch.Tensor, C: int, q: Quantiser, given: torch.Tensor | None, act: Activation | None, slots: Slots | None,
    counts: torch.Tensor | None, h: torch.Tensor | None, codes: torch.Tensor, scales: torch.Tensor,
) -> None:  # fmt: skip
    e8m0 = q.rule != "amax"
    parameters = act or Activation("relu_no_mul")
    library.call(
        "quantise", "moeproof_quantise", x.device,
        dtype=x.dtype, x=x, h=h, R=x.size(0), C=C, activated=act is not None, kind=KINDS[parameters.name],
        interleaved=bool(parameters.interleaved), alpha=parameters.alpha or 0.0, beta=parameters.beta or 0.0,
        limit=parameters.limit or 0.0, linear_beta=parameters.linear_beta or 0.0,
        stride_xr=x.stride(0), stride_xn=x.stride(1),
        stride_hr=h.stride(0) if h is not None else 0, stride_hi=h.stride(1) if h is not None else 0,
        group=_group(q, C), format=FORMATS.index(q.fmt), rule=STATIC if q.static else RULES[q.rule],
        quotient=QUOTIENTS[q.quotient], top=q.format.max, floor=q.floor, emax=q.format.emax,
        top_bits=_mantissa(q.format.max), given=given, codes=codes, scales=None if e8m0 or q.static else scales,
        exponents=scales if e8m0 else None, code_bytes=codes.size(1),
        counts=counts, region=x.size(0) // counts.numel() if counts is not None else 1,
        **(slot_arguments(slots) if slots else NO_SLOTS),
    )  # fmt: skip


def _mantissa(x: float) -> int:
    """The 23 mantissa bits of x as a float32."""
    return int(struct.unpack("<I", struct.pack("<f", x))[0] & 0x7FFFFF)
