"""Churn of a GPU's caching allocator: every block that nobody owns is handed to somebody else.

A captured graph keeps addresses, not tensors. What it captured of a block that was freed since belongs to whoever allocates
it next: a replay then reads that owner's bytes, and writes over them. Here the next owner is a canary on each free block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Tensor = torch.Tensor
SMALL = 1 << 20
"""The allocator keeps requests of up to so many bytes in segments of their own; a larger one would not land in them."""


def canaries(device: torch.device) -> list[Tensor]:
    """uint8 tensors of 0xFF bytes on all free blocks of the device's default pool. Waits for the device.

    Private pools of graphs are left alone: their blocks are the graph's own. A freed block stays with the stream that it was
    allocated on, so each canary is allocated there. No memory is taken that was not the allocator's before.
    """
    torch.cuda.synchronize(device)
    held: list[Tensor] = []
    for stream, size in free_blocks(torch.cuda.memory_snapshot(), device.index or 0):
        where = torch.cuda.ExternalStream(stream, device) if stream else torch.cuda.default_stream(device)
        with torch.cuda.stream(where):
            held.append(torch.full((size,), 0xFF, dtype=torch.uint8, device=device))
    torch.cuda.synchronize(device)
    return held


def free_blocks(segments: Sequence[dict[str, Any]], device: int) -> list[tuple[int, int]]:
    """(stream, bytes) that take all free blocks of torch.cuda.memory_snapshot() if they are allocated in this order.

    The largest first: each finds a block of its very size, as the allocator takes the smallest that is large enough.
    """
    found = []
    for segment in segments:
        if segment["device"] != device or tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0):
            continue
        most = SMALL if segment["segment_type"] == "small" else segment["total_size"]
        for block in segment["blocks"]:
            size = block["size"] if block["state"] == "inactive" else 0
            pieces = [most] * (size // most) + [size % most] * (size % most > 0)
            # A rest of a large segment that only a small request could take cannot be had: such a request goes elsewhere.
            found += [(segment["stream"], n) for n in pieces if segment["segment_type"] == "small" or n > SMALL]
    return sorted(found, key=lambda piece: (-piece[1], piece[0]))


def trampled(held: Sequence[Tensor]) -> int:
    """Bytes of the canaries that somebody wrote to."""
    return sum(int((t != 0xFF).count_nonzero()) for t in held if not bool((t == 0xFF).all()))
