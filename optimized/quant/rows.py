"""QUANT1 and QUANT2 of the fused fp8 layer: rows to e4m3 codes by the conversion instruction, one pass, at the speed of memory.

The general quantiser (quantise.py) encodes by integer arithmetic and divides by the library, which costs more than the bytes
it moves. Here a quotient is refined from the reciprocal of its group's scale, and Hopper's own conversion rounds it once.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.schemes import Quantiser

Tensor = torch.Tensor
LARGEST = tl.constexpr(448.0)
FLOOR = tl.constexpr(1e-10)
"""Of e4m3, and of amax in fp8_token and fp8_block."""
WIDEST = 16384
"""Columns that share a row's scale are held by one program."""


@triton.jit
def e4m3_codes(value, scale):
    """e4m3 of fl(value / scale), ties to even, saturating; NaN stays NaN. `scale` broadcasts over value, both float32.

    The quotient by the rounded reciprocal is off by two units in the last place at most; two corrections by the exact remainder
    round it as division does (Markstein 1990). Magnitudes at which a remainder would leave float32's range have code 0.
    """
    inverse = tl.div_rn(1.0, scale)
    q = value * inverse
    q = tl.fma(tl.fma(-q, scale, value), inverse, q)
    q = tl.fma(tl.fma(-q, scale, value), inverse, q)
    # The conversion saturates on the GPU; other backends may not.
    q = tl.where(q > LARGEST, LARGEST, tl.where(q < -LARGEST, -LARGEST, q))
    return q.to(tl.float8e4nv)


@triton.jit
def scale_of(largest):
    """The float32 scale of a group by its largest magnitude."""
    return tl.div_rn(tl.maximum(largest, FLOOR), LARGEST)


@triton.jit(do_not_specialize=["R"])
def _quantise_rows(
    x, codes, scales, num_live, R, C, G, stride_xr, stride_xc,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    after_previous(OVERLAP)
    if num_live is not None:
        R = tl.load(num_live)
    if tl.program_id(0) * BLOCK_R < R:
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
        column = tl.program_id(1) * BLOCK_G * WIDTH + tl.arange(0, BLOCK_G * WIDTH)
        mask = (row < R)[:, None] & (column < C)[None, :]
        wide = row.to(tl.int64)[:, None]
        value = tl.load(x + wide * stride_xr + column[None, :] * stride_xc, mask=mask, other=0.0).to(tl.float32)
        value = tl.reshape(value, [BLOCK_R, BLOCK_G, WIDTH])
        scale = scale_of(tl.max(tl.abs(value), 2))
        code = tl.reshape(e4m3_codes(value, scale[:, :, None]), [BLOCK_R, BLOCK_G * WIDTH])
        tl.store(codes + wide * C + column[None, :], code, mask=mask)
        tl.store(scales + wide * G + group[None, :], scale, mask=(row < R)[:, None] & (group < G)[None, :])


def code_rows(q: Quantiser, R: int, C: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes (R, C) and scales (R, G)."""
    codes = torch.empty(R, C, dtype=torch.float8_e4m3fn, device=device)
    return codes, torch.empty(R, q.groups(C), dtype=torch.float32, device=device)


def quantise_rows(
    x_RC: Tensor, q: Quantiser, num_live: Tensor | None = None, overlap: bool = False, first: bool = False
) -> tuple[Tensor, Tensor]:
    """(codes (R, C), scales (R, G)) of x (R, C) by the schemes fp8_token or fp8_block; with `num_live` int32 (1,), of the
    first num_live rows only: the others are neither read nor written."""
    R, C = x_RC.shape
    check(q.fmt == "e4m3fn" and q.rule == "amax" and q.quotient == "divide", f"rows are quantised to e4m3 by amax, not {q}")
    check(q.group[0] == 1, f"scales are of rows, not of groups {q.group}")
    check(q.group[1] > 0 or C <= WIDEST, f"{C} columns share a scale; at most {WIDEST} are supported")
    codes, scales = code_rows(q, R, C, x_RC.device)
    G = q.groups(C)
    if not codes.numel():
        return codes, scales
    width = q.group[1] or triton.next_power_of_2(C)
    elements = 65536 if interpreted() else max(4096, width)
    block_g = min(max(1, 2048 // width), triton.next_power_of_2(G))
    # Few rows: a program for each group or two, so that more of them are read at once.
    block_r = min(max(elements // (block_g * width), 1), triton.next_power_of_2(R))
    _quantise_rows[(triton.cdiv(R, block_r), triton.cdiv(G, block_g))](
        x_RC, codes, scales, num_live, R, C, G, *x_RC.stride(),
        BLOCK_R=block_r, BLOCK_G=block_g, WIDTH=width, num_warps=8 if width > 2048 else 4, **launch_options(overlap, first),
    )  # fmt: skip
    return codes, scales
