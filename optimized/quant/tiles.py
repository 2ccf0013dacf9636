"""Tile shapes of the products on codes, from sizes alone. A step never crosses a scale group or a promotion."""

from __future__ import annotations

import triton

from moeproof.optimized.tiles import Tile, interpreted
from moeproof.reference.contract.formats import Format

BY_ROWS = {
    16: Tile(16, 64, 128, 1, 4, 4),
    32: Tile(32, 64, 128, 1, 4, 4),
    64: Tile(64, 128, 128, 4, 8, 3),
    128: Tile(128, 128, 128, 8, 8, 3),
}
"""By block_m, for one-byte operands. Each program holds a sum and a partial sum."""
WIDE = {
    16: Tile(16, 64, 64, 1, 4, 4),
    32: Tile(32, 64, 64, 1, 4, 4),
    64: Tile(64, 128, 64, 4, 8, 3),
    128: Tile(128, 64, 64, 8, 8, 3),
}
"""For operands of 16 bits, decoded in registers. 128 x 128 spills where both sides are decoded."""
FP32 = {m: Tile(m, 64, 16, 1, 8 if m == 128 else 4, 2) for m in (16, 32, 64, 128)}
"""IEEE products run from registers, outside the tensor cores."""


def mean_rows(slots: int, experts: int, C: int) -> int:
    """Rows of an expert's region in the batched layout, on average, of C at most: what its tiles are chosen by."""
    return min(C, slots // experts + 1)


def quant_tile(block_m: int, N: int, K: int, operand: str, dtype: Format, step: int) -> Tile:
    """Tile for an output of N columns and products of length K; partial sums are scaled every `step` columns (0 = never)."""
    one_byte = operand in ("e4m3fn", "int8")
    if interpreted():
        # A program costs milliseconds whatever its size.
        table = {m: Tile(m, 256, 128 if one_byte else 256) for m in BY_ROWS}
    elif one_byte:
        table = BY_ROWS
    else:
        table = FP32 if operand == "dtype" and dtype.name == "fp32" else WIDE
    t = table[block_m]
    block_n = min(t.block_n, max(16, triton.next_power_of_2(N)))
    # 8-bit tensor cores take 32 columns at once, and groups of 16 scales enter a step whole.
    short = max(32, triton.next_power_of_2(K))
    if K % 16 and not interpreted():
        # Rows that start anywhere are loaded element by element, each with its own pointer: large tiles spill.
        short, block_n = 32, min(block_n, 64)
    if 0 < step < t.block_k and not interpreted():
        block_n = min(block_n, 64)  # room for the scales of both sides, beside two sums
    block_k = min(t.block_k, short, step or t.block_k)
    return Tile(block_m, block_n, block_k, t.group_m, t.warps, t.stages)
