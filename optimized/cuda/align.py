"""PERMUTE in CUDA C++: the twin of optimized.align. Its Alignment is the same, so that either feeds either GEMM."""

from __future__ import annotations

import torch

from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.slots import slot_arguments
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.errors import check

MOST_EXPERTS = 1024
"""Local experts, at most: a block keeps a table of them for each warp in shared memory."""


def _check(slots: Slots) -> None:
    check(slots.num_local <= MOST_EXPERTS, f"{slots.num_local} local experts; the CUDA sort takes at most {MOST_EXPERTS}")
    library.check_tensors(topk_ids=slots.ids, expert_map=slots.expert_map)


def _sort(
    slots: Slots, target: torch.Tensor, counts: torch.Tensor, block_m: int, capacity: int,
    block_expert: torch.Tensor | None, num_padded: torch.Tensor | None,
) -> None:  # fmt: skip
    S, e, device = slots.count, slots.num_local, slots.ids.device
    P = target.numel() if block_m else 0
    chunk = library.query("align", "moeproof_align_chunk", device, num_slots=S)
    bins = torch.empty(-(-S // chunk), e, dtype=torch.int32, device=device) if chunk else None
    library.call(
        "align", "moeproof_align", device,
        num_slots=S, block_m=block_m, capacity=capacity, P=P, B=block_expert.numel() if block_expert is not None else 0,
        target=target, block_expert=block_expert, num_padded=num_padded, counts=counts, histogram=bins, chunk=chunk,
        **slot_arguments(slots),
    )  # fmt: skip


def align(slots: Slots, block_m: int) -> Alignment:
    """Sort live slots by local expert, stably, and pad each expert's group to a multiple of block_m. See Alignment."""
    check(block_m >= 1, f"block_m={block_m} must be >= 1")
    _check(slots)
    S, e = slots.count, slots.num_local
    # A non-empty expert wastes at most block_m - 1 rows, and there are at most min(S, e) of them.
    B = (S + min(S, e) * (block_m - 1)) // block_m
    rows, blocks, padded, counts = (torch.empty(n, dtype=torch.int32, device=slots.ids.device) for n in (B * block_m, B, 1, e))
    if S:
        _sort(slots, rows, counts, block_m, 0, blocks, padded)
    else:
        padded.zero_()
        counts.zero_()
    return Alignment(rows, blocks, padded, counts, block_m)


def batch_rows(slots: Slots, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows int32 (S,), counts int32 (e,)): each live slot's row expert * capacity + position of the batched layout.

    Positions follow slot order. Dead slots, and slots beyond the capacity, have row -1; counts are not capped.
    """
    check(capacity >= 1, f"capacity={capacity} must be >= 1")
    _check(slots)
    rows = torch.empty(slots.count, dtype=torch.int32, device=slots.ids.device)
    counts = torch.zeros(slots.num_local, dtype=torch.int32, device=slots.ids.device)
    if slots.count:
        _sort(slots, rows, counts, 0, capacity, None, None)
    return rows, counts
