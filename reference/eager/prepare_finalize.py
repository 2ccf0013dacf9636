"""Prepare and finalize on one rank, in the standard and in the batched layout. Unquantised.

Both weigh and sum in float32, slot by slot, and round once. Slots that are not routed are skipped by selection and not by
a zero weight: 0 * inf and NaN weights cannot get through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize, Prepared
from moeproof.reference.eager.slots import check_routing, check_unquantised, local_ids, num_local_experts, weighted_input

Tensor = torch.Tensor


def check_output(output: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    check(
        output.dim() == 2 and output.size(0) == topk_ids.size(0) and topk_ids.shape == topk_weights.shape,
        f"output is {tuple(output.shape)}, topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}; "
        "output must be (tokens, hidden), the others (tokens, slots)",
    )


def reduce_slots(output: Tensor, y_TKH: Tensor, live_TK: Tensor, topk_weights: Tensor, weighted_already: bool) -> None:
    """output (T, H) = sum of w * y over live slots, in float32 from the first slot to the last, rounded once."""
    total = torch.zeros(output.shape, dtype=torch.float32, device=output.device)
    for slot in range(live_TK.size(1)):
        y = y_TKH[:, slot].float()
        if not weighted_already:
            y = y * topk_weights[:, slot, None].float()
        total += torch.where(live_TK[:, slot, None], y, 0.0)
    output.copy_(total)


class NoEPPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Standard layout, nothing to exchange: rows stay where they are. Holds no state."""

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        """(a1 itself or its weighted copy, None, None, None, None)."""
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
        check_routing(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        local_ids(topk_ids, num_experts, expert_map)  # for its refusals
        rows = weighted_input(a1, topk_weights, topk_ids) if apply_router_weight_on_input else a1
        return rows, None, None, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (tokens, slots, hidden), or empty where nothing arrived. It is not modified."""
        check_output(output, topk_weights, topk_ids)
        if fused_expert_output.numel() == 0:
            output.zero_()
            return
        check(
            tuple(fused_expert_output.shape) == (*topk_ids.shape, output.size(1)),
            f"fused_expert_output is {tuple(fused_expert_output.shape)}, must be {(*topk_ids.shape, output.size(1))}",
        )
        reduce_slots(output, fused_expert_output, topk_ids >= 0, topk_weights, apply_router_weight_on_input)


@dataclass(frozen=True)
class _Sent:
    """What finalize must know of its prepare."""

    topk_ids: Tensor
    row_TK: Tensor
    """int64: expert * rows + position in the batched buffer, -1 where the slot has no row here."""
    num_local: int


class BatchedPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Batched layout (e, max_rows, hidden): one region per local expert, its rows in (token, slot) order.

    Every live slot takes a row, duplicates too. An expert with more than `max_rows` raises before anything is written.
    Rows beyond an expert's count hold NaN, so that whoever reads them shows it. `max_num_tokens` bounds the tokens of a
    rank, None for no bound.

    State: prepare remembers where each slot went, and the next finalize reads it. Hence one instance serves one layer,
    every prepare is followed by its own finalize, and finalize gets the ids that prepare got. Experts that live on other
    ranks have no row here and contribute 0.
    """

    def __init__(self, max_rows: int, max_num_tokens: int | None = None) -> None:
        check(max_rows >= 1, f"max_rows={max_rows} must be at least 1")
        check(max_num_tokens is None or max_num_tokens >= 0, f"max_num_tokens={max_num_tokens} must not be negative")
        self.max_rows = max_rows
        self.max_num_tokens = max_num_tokens
        self._sent: _Sent | None = None

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        """(rows (e, max_rows, hidden), None, counts int32 (e,), None, None). Counts are of (token, slot) pairs."""
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
        check_routing(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        rows, bound = self.max_rows, self.max_num_tokens
        check(bound is None or a1.size(0) <= bound, f"{a1.size(0)} tokens on this rank, at most {bound} are allowed")
        local_TK = local_ids(topk_ids, num_experts, expert_map)
        num_local = num_local_experts(num_experts, expert_map)
        position_TK = torch.full_like(local_TK, -1)
        counts = torch.zeros(num_local, dtype=torch.int32, device=a1.device)
        for expert in range(num_local):
            here = local_TK == expert
            count = int(here.sum())
            if count > rows:
                name = int(topk_ids[here][0])
                raise ContractError(
                    f"expert {name} (local {expert}) gets {count} rows, its region of the batched layout holds {rows}; "
                    "nothing was written"
                )
            position_TK[here] = expert * rows + torch.arange(count, device=a1.device)
            counts[expert] = count
        source = weighted_input(a1, topk_weights, topk_ids) if apply_router_weight_on_input else a1
        buffer = torch.full((num_local * rows, a1.size(1)), torch.nan, dtype=a1.dtype, device=a1.device)
        tokens, slots = torch.nonzero(position_TK >= 0, as_tuple=True)
        buffer[position_TK[tokens, slots]] = source[tokens]
        self._sent = _Sent(topk_ids.clone(), position_TK, num_local)
        return buffer.view(num_local, rows, a1.size(1)), None, counts, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (e, max_rows, hidden), or empty where nothing arrived. It is not modified."""
        check_output(output, topk_weights, topk_ids)
        sent = self._sent
        if sent is None or not torch.equal(sent.topk_ids, topk_ids):
            raise ContractError("finalize got topk_ids that the last prepare of this instance did not; call prepare first")
        if fused_expert_output.numel() == 0:
            output.zero_()
            return
        shape = (sent.num_local, self.max_rows, output.size(1))
        check(
            tuple(fused_expert_output.shape) == shape,
            f"fused_expert_output is {tuple(fused_expert_output.shape)}, must be {shape}",
        )
        y_TKH = fused_expert_output.reshape(-1, output.size(1))[sent.row_TK.clamp(min=0)]
        reduce_slots(output, y_TKH, sent.row_TK >= 0, topk_weights, apply_router_weight_on_input)
