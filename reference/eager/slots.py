"""Which (token, slot) pairs live here, and the refusals all implementations of this folder share."""

from __future__ import annotations

import torch

from moeproof.reference.contract.checks import check_ids
from moeproof.reference.contract.errors import check

Tensor = torch.Tensor


def local_ids(topk_ids: Tensor, num_experts: int, expert_map: Tensor | None) -> Tensor:
    """int64 (tokens, slots): index into the local weights, -1 where the slot is not routed or its expert is remote.

    `num_experts` is the global count. Ids out of range are refused; the map is never indexed by -1, which would wrap to
    its last entry.
    """
    check_ids(topk_ids, num_experts)
    ids = topk_ids.long()
    if expert_map is None:
        return ids
    check(
        expert_map.dtype == torch.int32 and tuple(expert_map.shape) == (num_experts,),
        f"expert_map is {expert_map.dtype} {tuple(expert_map.shape)}, must be torch.int32 ({num_experts},)",
    )
    return torch.where(ids >= 0, expert_map.long()[ids.clamp(min=0)], -1)


def num_local_experts(num_experts: int, expert_map: Tensor | None) -> int:
    """How many experts this rank holds. Refuses a map whose local indices are not 0..e-1, each once, and -1 elsewhere."""
    if expert_map is None:
        return num_experts
    local = sorted(int(i) for i in expert_map.tolist() if i != -1)
    check(
        local == list(range(len(local))),
        f"expert_map holds the local indices {local}; they must be 0..{len(local) - 1}, each once, and -1 elsewhere",
    )
    return len(local)


def check_routing(a1: Tensor, topk_weights: Tensor, topk_ids: Tensor, apply_router_weight_on_input: bool) -> None:
    """Shapes and dtypes of what prepare gets: a1 (tokens, K), weights and ids (tokens, slots)."""
    check(a1.dim() == 2, f"a1 has {a1.dim()} dims, must have 2: (tokens, hidden)")
    check(
        topk_ids.dim() == 2 and topk_ids.shape == topk_weights.shape and topk_ids.size(0) == a1.size(0),
        f"topk_ids is {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}; both must be ({a1.size(0)}, slots)",
    )
    check(
        not topk_ids.dtype.is_floating_point and topk_ids.dtype != torch.bool,
        f"topk_ids is {topk_ids.dtype}, must be an integer dtype",
    )
    check(topk_weights.dtype.is_floating_point, f"topk_weights is {topk_weights.dtype}, must be a floating dtype")
    check(
        not apply_router_weight_on_input or topk_ids.size(1) == 1,
        f"apply_router_weight_on_input with topk={topk_ids.size(1)}: allowed only for one slot per token",
    )


def check_unquantised(**tensors: Tensor | None) -> None:
    """Refuse scales and zero points by name: this folder computes unquantised schemes only."""
    given = [name for name, tensor in tensors.items() if tensor is not None]
    check(not given, f"{', '.join(given)} given, but this implementation is unquantised; allowed: None")


def sum_slots(y_TKH: Tensor, live_TK: Tensor, topk_weights: Tensor, weighted_already: bool) -> Tensor:
    """float32 (T, H): sum of w * y over live slots, from the first slot to the last."""
    total = torch.zeros(y_TKH.size(0), y_TKH.size(2), dtype=torch.float32, device=y_TKH.device)
    for slot in range(live_TK.size(1)):
        y = y_TKH[:, slot].float()
        if not weighted_already:
            y = y * topk_weights[:, slot, None].float()
        total += torch.where(live_TK[:, slot, None], y, 0.0)
    return total


def weighted_input(a1: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """a1 (tokens, K) times each token's only weight, in float32, rounded to a1's dtype; zero rows where the id is -1."""
    weight = torch.where(topk_ids >= 0, topk_weights.float(), 0.0)
    rows = torch.where(topk_ids >= 0, a1.float(), 0.0)
    return (rows * weight).to(a1.dtype)
