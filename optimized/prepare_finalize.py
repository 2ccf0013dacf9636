"""The seed's [Dispatch] and [Combine] on one rank, in both layouts. Unquantised: scales are refused, never ignored."""

from __future__ import annotations

import torch

from moeproof.optimized.align import batch_rows
from moeproof.optimized.combine import combine
from moeproof.optimized.dispatch import move_rows, weigh_input
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize

Prepared = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def check_unquantised(**scales: torch.Tensor | None) -> None:
    """Refuse arguments that only quantised kernels can honour."""
    for name, value in scales.items():
        check(value is None, f"{name} was given, but this implementation is unquantised; it must be None")


def _check_weight_on_input(apply_router_weight_on_input: bool, topk_ids: torch.Tensor) -> None:
    check(
        not apply_router_weight_on_input or topk_ids.size(1) == 1,
        f"apply_router_weight_on_input with topk={topk_ids.size(1)}: allowed only for one slot per token",
    )


class TritonNoEPPrepareFinalize(FusedMoEPrepareAndFinalize):
    """Standard layout: rows stay where they are, and the experts gather them."""

    def __init__(self) -> None:
        self._map: tuple[int, torch.Tensor | None] | None = None
        """(global experts, expert_map) of the last prepare: finalize, which is not told, skips remote slots by it."""

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return None

    def prepare(
        self,
        a1: torch.Tensor,
        a1_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
        _check_weight_on_input(apply_router_weight_on_input, topk_ids)
        self._map = (num_experts, expert_map)
        a1q = weigh_input(a1, topk_weights) if apply_router_weight_on_input else a1
        return a1q, None, None, None, None

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        M, K = output.shape
        if not output.numel():
            return
        check(
            fused_expert_output.shape == (M, topk_ids.size(1), K),
            f"fused_expert_output is {tuple(fused_expert_output.shape)}, must be {(M, topk_ids.size(1), K)}",
        )
        num_experts, expert_map = self._map or (2**31 - 1, None)
        num_local = num_experts if expert_map is None else 2**31 - 1  # the map's own entries were checked by the experts
        slots = Slots(topk_ids, num_experts, num_local, expert_map)
        combine(_rows(fused_expert_output), topk_weights, slots, output, weighted=not apply_router_weight_on_input)


class TritonBatchedPrepareFinalize(FusedMoEPrepareAndFinalize):
    """Batched layout: each local expert has a region of `max_rows` rows, valid rows first, in slot order."""

    _place = staticmethod(batch_rows)
    _move = staticmethod(move_rows)
    _combine = staticmethod(combine)
    """Stages, which a subclass may take from elsewhere."""

    def __init__(self, max_rows: int, num_local_experts: int, max_num_tokens: int | None = None) -> None:
        check(max_rows >= 1, f"max_rows={max_rows} must be >= 1")
        check(num_local_experts >= 1, f"num_local_experts={num_local_experts} must be >= 1")
        self.max_rows = max_rows
        self.num_local_experts = num_local_experts
        self.max_num_tokens = max_num_tokens
        self._rows: torch.Tensor | None = None
        """int32 (M * topk,) of the last prepare: the row of each slot in the batched layout, -1 for dead slots."""

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def prepare(
        self,
        a1: torch.Tensor,
        a1_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        """Raises ContractError where an expert gets more than max_rows rows.

        That check reads the counts on the host, only where M * topk > max_rows: below, nothing can overflow and the
        call can be captured in a CUDA graph.
        """
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
        _check_weight_on_input(apply_router_weight_on_input, topk_ids)
        slots = Slots(topk_ids, num_experts, self.num_local_experts, expert_map)
        rows, counts = self._place(slots, self.max_rows)
        if slots.count > self.max_rows:
            most = int(counts.max())
            check(
                most <= self.max_rows,
                f"expert {int(counts.argmax())} (local index) gets {most} rows; at most {self.max_rows} fit its region",
            )
        a1q = torch.empty(self.num_local_experts, self.max_rows, a1.size(1), dtype=a1.dtype, device=a1.device)
        weights = topk_weights if apply_router_weight_on_input else None
        self._move(a1, _rows(a1q), slots.K, rows=rows, weights_TK=weights)
        self._rows = rows
        return a1q, None, counts, None, None

    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        rows = self._rows
        check(
            rows is not None and rows.numel() == topk_ids.numel(),
            "finalize needs the row map of the prepare call with the same topk_ids; call prepare first",
        )
        shape = (self.num_local_experts, self.max_rows, output.size(1))
        check(
            fused_expert_output.shape == shape,
            f"fused_expert_output is {tuple(fused_expert_output.shape)}, must be {shape}",
        )
        slots = Slots(topk_ids, self.num_local_experts, self.num_local_experts)
        weighted = not apply_router_weight_on_input
        self._combine(_rows(fused_expert_output), topk_weights, slots, output, weighted=weighted, rows=rows)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(A, B, C) as rows (A * B, C), without a copy."""
    check(
        x.size(0) <= 1 or x.size(1) <= 1 or x.stride(0) == x.size(1) * x.stride(1),
        f"expert rows of shape {tuple(x.shape)} with strides {x.stride()} cannot be seen as one list of rows",
    )
    return x.flatten(0, 1)
