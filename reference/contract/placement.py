"""Which experts live on which expert-parallel rank."""

from __future__ import annotations

import torch

from moeproof.reference.contract.errors import check, known

PLACEMENTS = {
    "linear": "consecutive experts; the first E mod R ranks hold one more",
    "round_robin": "expert e lives on rank e mod R",
}


def local_experts(num_experts: int, num_ranks: int, rank: int, placement: str = "linear") -> list[int]:
    """Global ids of the experts on `rank`, in local order. E need not be divisible by R."""
    known("placement", placement, PLACEMENTS)
    check(num_ranks >= 1 and 0 <= rank < num_ranks, f"rank {rank} is not in [0, {num_ranks})")
    if placement == "round_robin":
        return list(range(rank, num_experts, num_ranks))
    base, extra = divmod(num_experts, num_ranks)
    first = rank * base + min(rank, extra)
    return list(range(first, first + base + (rank < extra)))


def expert_map(num_experts: int, num_ranks: int, rank: int, placement: str = "linear") -> torch.Tensor | None:
    """int32 (E,): local index in [0, e) or -1 where the expert lives elsewhere. None for a single rank (identity)."""
    if num_ranks == 1:
        return None
    mapping = torch.full((num_experts,), -1, dtype=torch.int32)
    for local, expert in enumerate(local_experts(num_experts, num_ranks, rank, placement)):
        mapping[expert] = local
    return mapping
