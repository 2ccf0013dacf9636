"""Churn of a GPU's caching allocator: every block that nobody owns is handed to somebody else.

A captured graph keeps addresses, not tensors. What it captured of a block that was freed since belongs to whoever allocates
it next: a replay then reads that owner's bytes, and writes over them. Here the next owner is a canary on each free block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor
ROUNDS = 4
"""Looks at the allocator: a block that was split leaves a rest, which the next look finds."""


def canaries(device: torch.device) -> list[Tensor]:
    """uint8 tensors of 0xFF bytes on all free blocks of the device's default pool. Waits for the device.

    Private pools of graphs are left alone: their blocks are the graph's own. A freed block stays with the stream that it was
    allocated on, so each canary is allocated there.
    """
    torch.cuda.synchronize(device)
    held: list[Tensor] = []
    for _ in range(ROUNDS):
        found = free_blocks(torch.cuda.memory_snapshot(), device.index or 0)
        if not found:
            break
        for stream, size in found:
            where = torch.cuda.ExternalStream(stream, device) if stream else torch.cuda.default_stream(device)
            with torch.cuda.stream(where):
                held.append(torch.full((size,), 0xFF, dtype=torch.uint8, device=device))
    torch.cuda.synchronize(device)
    return held


def free_blocks(segments: Sequence[dict[str, object]], device: int) -> list[tuple[int, int]]:
    """(stream, bytes) of the free blocks in torch.cuda.memory_snapshot(), the largest first."""
    blocks = [
        (int(segment["stream"]), int(block["size"]))  # type: ignore[call-overload]
        for segment in segments
        if segment["device"] == device and tuple(segment.get("segment_pool_id", (0, 0))) == (0, 0)  # type: ignore[arg-type]
        for block in segment["blocks"]  # type: ignore[attr-defined]
        if block["state"] == "inactive"
    ]
    return sorted(blocks, key=lambda b: (-b[1], b[0]))


def trampled(held: Sequence[Tensor]) -> int:
    """Bytes of the canaries that somebody wrote to."""
    return sum(int((t != 0xFF).sum()) for t in held)
