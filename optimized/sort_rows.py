"""Rows gathered into sorted order, for kernels that read whole blocks of neighbours."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.align import Alignment
from moeproof.optimized.tiles import interpreted

Tensor = torch.Tensor


@triton.jit(do_not_specialize=["num_slots", "slots_per_row"])
def _sort_rows(
    x, out, sorted_slots, num_padded, num_slots, slots_per_row, C, stride_r,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    position = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(0) * BLOCK_R < tl.load(num_padded):
        slot = tl.load(sorted_slots + position)
        column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        inside = (column < C)[None, :]
        row = (slot // slots_per_row).to(tl.int64)[:, None]
        tile = tl.load(x + row * stride_r + column[None, :], mask=(slot < num_slots)[:, None] & inside, other=0)
        tl.store(out + position.to(tl.int64)[:, None] * C + column[None, :], tile, mask=inside)


def sort_rows(x_RC: Tensor, alignment: Alignment, slots_per_row: int) -> Tensor:
    """(P, C): x[slot // slots_per_row] at each sorted position in use, zeros in padding. Bytes are moved, of any dtype."""
    P = alignment.sorted_slots.numel()
    sorted_PC = torch.empty(P, x_RC.size(1), dtype=x_RC.dtype, device=x_RC.device)
    source = (x_RC if x_RC.stride(1) == 1 else x_RC.contiguous()).view(torch.uint8)
    (R, C), out = source.shape, sorted_PC.view(torch.uint8)
    block_r, block_c = (min(alignment.block_m, 16), 512) if not interpreted() else (alignment.block_m, 4096)
    _sort_rows[(triton.cdiv(P, block_r), triton.cdiv(C, block_c))](
        source, out, alignment.sorted_slots, alignment.num_padded, R * slots_per_row,
        slots_per_row, C, source.stride(0), BLOCK_R=block_r, BLOCK_C=min(block_c, triton.next_power_of_2(C)),
    )  # fmt: skip
    return sorted_PC
