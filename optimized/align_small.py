"""The counting sort of few slots in one launch: every program counts all of them for itself, so that none waits for another."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.slots import Slots, local_expert
from moeproof.optimized.tiles import interpreted

SLOTS = 6144
"""Slots at most: beyond this, counting everything again costs more than a second launch (12.2 to 10.0 us at 8192, H100)."""
PART = 2048
"""Slots counted at once."""
BLOCKS = 16
"""Row blocks that a program maps and pads, about."""


@triton.jit
def _align_small(
    sorted_slots, block_expert, num_padded, counts, num_slots, B,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    ALL: tl.constexpr, PART: tl.constexpr, MINE: tl.constexpr, EP: tl.constexpr, MAP: tl.constexpr, STEP: tl.constexpr,
    BLOCK_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program p places slots p * MINE .. and fills blocks p * MAP ..; the places of all programs are disjoint."""
    after_previous(OVERLAP)
    first_slot = tl.program_id(0) * MINE
    total = tl.zeros([EP], tl.int32)
    before = tl.zeros([EP], tl.int32)
    for first in tl.static_range(0, ALL, PART):
        some = first + tl.arange(0, PART)
        local = local_expert(some, some < num_slots, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        bins = tl.maximum(local, 0)
        counted = tl.histogram(bins, EP, mask=local >= 0)
        total += counted
        # Counting costs more than loading: only the part that holds this program's own slots is counted twice.
        if first + PART <= first_slot:
            before += counted
        elif first < first_slot:
            before += tl.histogram(bins, EP, mask=(local >= 0) & (some < first_slot))
    padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    end = tl.cumsum(padded, 0)
    start = end - padded
    expert = tl.arange(0, EP)
    if tl.program_id(0) == 0:
        tl.store(counts + expert, total, mask=expert < num_local)
        tl.store(num_padded, tl.sum(padded, 0))
    for first in range(0, MAP, STEP):
        block = tl.program_id(0) * MAP + first + tl.arange(0, STEP)
        owner = tl.sum((end[:, None] <= block[None, :] * BLOCK_M).to(tl.int32), 0)
        tl.store(block_expert + block, tl.where(owner < num_local, owner, -1), mask=block < B)
        # Padding starts where the owner's slots end; the unused tail has no owner and is all padding.
        slots_end = tl.sum(tl.where(expert[:, None] == owner[None, :], (start + total)[:, None], 0), 0)
        row = block[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        padding = (row >= slots_end[:, None]) & (block < B)[:, None]
        tl.store(sorted_slots + row, tl.zeros([STEP, BLOCK_M], tl.int32) + num_slots, mask=padding)
    step = tl.arange(0, MINE)
    slot = first_slot + step
    mine = local_expert(slot, slot < num_slots, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    # Sums along dim 0 stay in a thread's registers; along dim 1 every row would be a reduction across its warp.
    earlier = (mine[:, None] == mine[None, :]) & (step[:, None] < step[None, :])
    position = tl.gather(start + before, tl.maximum(mine, 0), 0) + tl.sum(earlier.to(tl.int32), 0)
    tl.store(sorted_slots + position, slot, mask=mine >= 0)


def align_small(
    slots: Slots,
    sorted_slots: torch.Tensor,
    block_expert: torch.Tensor,
    num_padded: torch.Tensor,
    counts: torch.Tensor,
    block_m: int,
    ep: int,
    mine: int,
    overlap: bool,
) -> None:
    """Fill an Alignment's tensors, contiguous int32. `ep`: the experts as a power of two; `mine`: slots a program places."""
    S, B = slots.count, block_expert.numel()
    programs = max(triton.cdiv(S, mine), triton.cdiv(B, BLOCKS))
    map_size = triton.next_power_of_2(triton.cdiv(B, programs))
    all_slots = max(triton.next_power_of_2(S), mine)
    part = min(all_slots, 65536 if interpreted() else PART)
    _align_small[(programs,)](
        sorted_slots, block_expert, num_padded, counts, S, B, *slots.arguments,
        ALL=all_slots, PART=part, MINE=mine, EP=ep, MAP=map_size, STEP=min(map_size, max(1, 4096 // max(ep, block_m))),
        BLOCK_M=block_m,
        num_warps=min(max(all_slots // 512, 4), 16), **launch_options(overlap, first=True),
    )  # fmt: skip
