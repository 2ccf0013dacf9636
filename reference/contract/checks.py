"""Argument checks shared by every implementation of the seed's interfaces. All raise ContractError before any launch."""

from __future__ import annotations

import torch

from moeproof.reference.contract.errors import ContractError, check


def check_ids(topk_ids: torch.Tensor, num_experts: int) -> None:
    """Refuse ids >= num_experts or < -1, naming the first bad (token, slot). Reads the tensor: for reference code only."""
    bad = (topk_ids >= num_experts) | (topk_ids < -1)
    if bool(bad.any()):
        token, slot = (int(i) for i in bad.nonzero()[0])
        value = int(topk_ids[token, slot])
        raise ContractError(
            f"topk_ids[{token}, {slot}] = {value} is out of range; "
            f"allowed: 0..{num_experts - 1}, or -1 for a slot that is not routed"
        )


def check_forward(
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    global_num_experts: int,
    expert_map: torch.Tensor | None,
    apply_router_weight_on_input: bool,
    ids_dtype: torch.dtype | None,
    max_tokens: int | None,
) -> None:
    """Shapes, dtypes and devices of one forward call. Looks at metadata only: no synchronisation."""
    check(hidden_states.dim() == 2, f"hidden_states has {hidden_states.dim()} dims, must have 2: (tokens, hidden)")
    check(w1.dim() == 3 and w2.dim() == 3, f"w1 and w2 have {w1.dim()} and {w2.dim()} dims, must have 3")
    check(
        topk_ids.dim() == 2 and topk_ids.shape == topk_weights.shape,
        f"topk_ids is {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}; both must be (tokens, slots)",
    )
    check(
        topk_ids.size(0) == hidden_states.size(0),
        f"topk_ids has {topk_ids.size(0)} rows, hidden_states {hidden_states.size(0)}; they must be equal",
    )
    check(
        not topk_ids.dtype.is_floating_point and topk_ids.dtype != torch.bool,
        f"topk_ids is {topk_ids.dtype}, must be an integer dtype",
    )
    check(topk_weights.dtype.is_floating_point, f"topk_weights is {topk_weights.dtype}, must be a floating dtype")
    check(
        ids_dtype is None or topk_ids.dtype == ids_dtype,
        f"topk_ids is {topk_ids.dtype}, this prepare/finalize needs {ids_dtype}",
    )
    check(
        max_tokens is None or hidden_states.size(0) <= (max_tokens or 0),
        f"{hidden_states.size(0)} tokens on this rank, at most {max_tokens} are allowed",
    )
    check(
        not apply_router_weight_on_input or topk_ids.size(1) == 1,
        f"apply_router_weight_on_input with topk={topk_ids.size(1)}: allowed only for one slot per token",
    )
    check_weights(w1, w2, hidden_states.size(1))
    check(
        hidden_states.dtype == w1.dtype or not _unpacked(w1),
        f"hidden_states is {hidden_states.dtype} and w1 {w1.dtype}; unquantised, they must be equal",
    )
    for name, tensor in (("w1", w1), ("w2", w2), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        check(
            tensor.device == hidden_states.device,
            f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}; all must share a device",
        )
    check_expert_map(expert_map, global_num_experts, w1.size(0), hidden_states.device)


def _unpacked(w: torch.Tensor) -> bool:
    """Weights as they are computed with: neither fp8 nor packed integers."""
    return w.dtype.is_floating_point and w.dtype.itemsize >= 2


def check_weights(w1: torch.Tensor, w2: torch.Tensor, hidden: int) -> None:
    """Unquantised w1 (e, N, K) and w2 (e, K, I) against each other and the hidden size. Packed weights are left alone."""
    check(w1.size(0) == w2.size(0), f"w1 holds {w1.size(0)} experts and w2 {w2.size(0)}; they must be equal")
    check(w2.size(1) == hidden, f"w2 has {w2.size(1)} output columns, hidden_states {hidden}; they must be equal")
    if _unpacked(w1):
        check(w1.size(2) == hidden, f"w1 has {w1.size(2)} input columns, hidden_states {hidden}; they must be equal")
        check(
            w1.size(1) in (w2.size(2), 2 * w2.size(2)),
            f"w1 has {w1.size(1)} rows per expert and w2 {w2.size(2)} input columns; w1 must have as many or twice as many",
        )
        check(w1.dtype == w2.dtype, f"w1 is {w1.dtype} and w2 {w2.dtype}; they must be equal")


def check_expert_map(expert_map: torch.Tensor | None, global_num_experts: int, num_local: int, device: torch.device) -> None:
    if expert_map is None:
        check(
            global_num_experts == num_local,
            f"global_num_experts={global_num_experts} but w1 holds {num_local} experts and there is no expert_map",
        )
        return
    check(
        expert_map.dtype == torch.int32 and expert_map.dim() == 1,
        f"expert_map is {expert_map.dtype} with {expert_map.dim()} dims, must be int32 (E,)",
    )
    check(
        expert_map.size(0) == global_num_experts,
        f"expert_map has {expert_map.size(0)} entries, global_num_experts is {global_num_experts}; they must be equal",
    )
    check(expert_map.device == device, f"expert_map is on {expert_map.device}, hidden_states on {device}")


def check_workspaces(workspace13: torch.Tensor, workspace2: torch.Tensor) -> None:
    check(
        workspace13.dim() == 1 and workspace2.dim() == 1 and workspace13.dtype == workspace2.dtype,
        f"workspaces are {tuple(workspace13.shape)} {workspace13.dtype} and {tuple(workspace2.shape)} {workspace2.dtype}; "
        "both must be flat and of one dtype",
    )
