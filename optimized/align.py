"""PERMUTE: a stable counting sort of slots by expert, in one launch for few slots and two for many.

Sizes are static: graph-capturable, no host sync.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeproof.optimized import align_small
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.slots import Slots, local_expert

STEP = 128
"""Slots ranked at once: a STEP x STEP comparison."""
PROGRAMS = 128
"""Programs at most, about: each reads the histograms of all."""


@dataclass(frozen=True)
class Alignment:
    """Slots grouped by expert, each group padded to block_m rows.

    With block_m = 4, K = 1 and local experts of slots 0..4 = 1, 0, 1, -1, 1 (S = 5):
    sorted_slots = 1 5 5 5 | 0 2 4 5 | 5 .., block_expert = 0 1 -1 .., num_padded = 8, counts = 1 3.
    """

    sorted_slots: torch.Tensor
    """int32 (P,): slots in ascending order inside an expert; S in padding and in the unused tail."""
    block_expert: torch.Tensor
    """int32 (B,): local expert of each block of block_m rows; -1 in the unused tail."""
    num_padded: torch.Tensor
    """int32 (1,): rows in use."""
    counts: torch.Tensor
    """int32 (e,): live slots of each local expert."""
    block_m: int

    @property
    def num_blocks(self) -> int:
        """Upper bound of blocks in use, known without looking at the ids."""
        return self.block_expert.numel()


@triton.jit
def _count(
    histogram, sorted_slots, num_slots, P,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    CHUNK: tl.constexpr, FILL: tl.constexpr, EP: tl.constexpr, STEP: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """histogram[chunk, expert] of live slots; fills this program's stripe of sorted_slots with padding."""
    after_previous(OVERLAP)
    chunk = tl.program_id(0)
    bins = tl.zeros([EP], tl.int32)
    for first in range(0, CHUNK, STEP):
        slot = chunk * CHUNK + first + tl.arange(0, STEP)
        local = local_expert(slot, slot < num_slots, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        bins += tl.histogram(tl.maximum(local, 0), EP, mask=local >= 0)
    tl.store(histogram + chunk * EP + tl.arange(0, EP), bins)
    if sorted_slots is not None:
        for first in range(0, FILL, 1024):
            row = chunk * FILL + first + tl.arange(0, 1024)
            tl.store(sorted_slots + row, tl.zeros([1024], tl.int32) + num_slots, mask=row < P)


@triton.jit
def _place(
    histogram, target, counts, block_expert, num_padded, num_slots, num_chunks, B, capacity,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, MAP: tl.constexpr, EP: tl.constexpr, STEP: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M > 0: target[position] = slot and the block map. BLOCK_M = 0: target[slot] = expert * capacity + position."""
    after_previous(OVERLAP)
    chunk = tl.program_id(0)
    expert = tl.arange(0, EP)
    total = tl.zeros([EP], tl.int32)
    before = tl.zeros([EP], tl.int32)
    for first in range(0, num_chunks, ROWS):
        row = first + tl.arange(0, ROWS)
        bins = tl.load(histogram + row[:, None] * EP + expert[None, :], mask=(row < num_chunks)[:, None], other=0)
        total += tl.sum(bins, 0)
        before += tl.sum(tl.where((row < chunk)[:, None], bins, 0), 0)
    if chunk == 0:
        tl.store(counts + expert, total, mask=expert < num_local)
    if BLOCK_M > 0:
        padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
        end = tl.cumsum(padded, 0)
        base = end - padded + before
        if chunk == 0:
            tl.store(num_padded, tl.sum(padded, 0))
        for first in range(0, MAP, BLOCKS):
            block = chunk * MAP + first + tl.arange(0, BLOCKS)
            owner = tl.sum((end[:, None] <= block[None, :] * BLOCK_M).to(tl.int32), 0)
            tl.store(block_expert + block, tl.where(owner < num_local, owner, -1), mask=block < B)
    else:
        base = before
    for first in range(0, CHUNK, STEP):
        step = tl.arange(0, STEP)
        slot = chunk * CHUNK + first + step
        real = slot < num_slots
        local = local_expert(slot, real, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        live = local >= 0
        # Sums along dim 0 stay in a thread's registers; along dim 1 every row would be a reduction across its warp.
        earlier = (local[:, None] == local[None, :]) & (step[:, None] < step[None, :])
        position = tl.gather(base, tl.maximum(local, 0), 0) + tl.sum(earlier.to(tl.int32), 0)
        if BLOCK_M > 0:
            tl.store(target + position, slot, mask=live)
        else:
            row = tl.where(live & (position < capacity), local * capacity + position, -1)
            tl.store(target + slot, row, mask=real)
        base += tl.histogram(tl.maximum(local, 0), EP, mask=live)


def _chunks(num_slots: int) -> tuple[int, int]:
    """(slots per program, programs)."""
    chunk = STEP * triton.next_power_of_2(triton.cdiv(num_slots, STEP * PROGRAMS))
    return chunk, triton.cdiv(num_slots, chunk)


def _experts_padded(num_local: int) -> int:
    return max(triton.next_power_of_2(num_local), 16)


def align(slots: Slots, block_m: int, overlap: bool = False) -> Alignment:
    """Sort live slots by local expert, stably, and pad each expert's group to a multiple of block_m. See Alignment.

    With `overlap`, a launch that follows may be set up meanwhile.
    """
    S, e = slots.count, slots.num_local
    # A non-empty expert wastes at most block_m - 1 rows, and there are at most min(S, e) of them.
    B = (S + min(S, e) * (block_m - 1)) // block_m
    P = B * block_m
    rows, blocks, padded, counts = (torch.empty(n, dtype=torch.int32, device=slots.ids.device) for n in (P, B, 1, e))
    result = Alignment(rows, blocks, padded, counts, block_m)
    if S == 0:
        padded.zero_()
        counts.zero_()
        return result
    ep = _experts_padded(e)
    if align_small.SLOTS >= S:
        align_small.align_small(slots, rows, blocks, padded, counts, block_m, ep, STEP, overlap)
        return result
    chunk, num_chunks = _chunks(S)
    histogram = torch.empty(num_chunks, ep, dtype=torch.int32, device=slots.ids.device)
    # Powers of two, so that few sizes are compiled: each program fills `fill` rows with padding and maps `map_size` blocks.
    fill = max(triton.next_power_of_2(triton.cdiv(P, num_chunks)), 1024)
    map_size = triton.next_power_of_2(triton.cdiv(B, num_chunks))
    per_step = min(map_size, max(1, 4096 // ep))
    _count[(num_chunks,)](
        histogram, rows, S, P, *slots.arguments, CHUNK=chunk, FILL=fill, EP=ep, STEP=STEP, **launch_options(overlap, first=True)
    )
    _place[(num_chunks,)](
        histogram, rows, counts, blocks, padded, S, num_chunks, B, 0, *slots.arguments,
        BLOCK_M=block_m, CHUNK=chunk, MAP=map_size, EP=ep, STEP=STEP, ROWS=max(1, 8192 // ep), BLOCKS=per_step, num_warps=8,
        **launch_options(overlap),
    )  # fmt: skip
    return result


def batch_rows(slots: Slots, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows int32 (S,), counts int32 (e,)): each live slot's row expert * capacity + position of the batched layout.

    Positions follow slot order. Dead slots, and slots beyond the capacity, have row -1; counts are not capped.
    """
    S, e = slots.count, slots.num_local
    rows = torch.empty(S, dtype=torch.int32, device=slots.ids.device)
    counts = torch.zeros(e, dtype=torch.int32, device=slots.ids.device)
    if S == 0:
        return rows, counts
    chunk, num_chunks = _chunks(S)
    ep = _experts_padded(e)
    histogram = torch.empty(num_chunks, ep, dtype=torch.int32, device=slots.ids.device)
    _count[(num_chunks,)](histogram, None, S, 0, *slots.arguments, CHUNK=chunk, FILL=0, EP=ep, STEP=STEP, OVERLAP=False)
    _place[(num_chunks,)](
        histogram, rows, counts, None, None, S, num_chunks, 0, capacity, *slots.arguments,
        BLOCK_M=0, CHUNK=chunk, MAP=0, EP=ep, STEP=STEP, ROWS=max(1, 4096 // ep), BLOCKS=1, OVERLAP=False,
    )  # fmt: skip
    return rows, counts
