"""Prepare and finalize on one rank, in the standard and in the batched layout. QUANT1 comes before dispatch.

Both weigh and sum in float32, slot by slot, and round once. Slots that are not routed are skipped by selection and not by
a zero weight: 0 * inf and NaN weights cannot get through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.formats import FORMATS
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize, Prepared
from moeproof.reference.contract.quant_checks import check_scale_values, check_static_scale
from moeproof.reference.contract.schemes import SCHEMES, QuantScheme
from moeproof.reference.eager.quantise import quantise
from moeproof.reference.eager.slots import (
    check_routing,
    check_unquantised,
    local_ids,
    num_local_experts,
    sum_slots,
    weighted_input,
)

Tensor = torch.Tensor
UNQUANTISED = SCHEMES["none"]


def check_output(output: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    check(
        output.dim() == 2 and output.size(0) == topk_ids.size(0) and topk_ids.shape == topk_weights.shape,
        f"output is {tuple(output.shape)}, topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)}; "
        "output must be (tokens, hidden), the others (tokens, slots)",
    )


def _quant1(
    rows: Tensor, scheme: QuantScheme, a1_scale: Tensor | None, a2_scale: Tensor | None, num_local: int
) -> tuple[Tensor, Tensor | None]:
    """QUANT1 of rows (T, H): (codes, scales), or the rows themselves and None where the scheme leaves activations alone."""
    if not scheme.quantised:
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
    check_static_scale("a1_scale", scheme.a1, a1_scale, 0, rows.device)
    check_static_scale("a2_scale", scheme.a2, a2_scale, num_local, rows.device)
    check_scale_values("a1_scale", a1_scale, FORMATS["fp32"])
    return (rows, None) if scheme.a1 is None else quantise(rows, scheme.a1, rows.dtype, a1_scale)


class NoEPPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Standard layout, nothing to exchange: rows stay where they are. Holds no state."""

    def __init__(self, scheme: QuantScheme = UNQUANTISED) -> None:
        self.scheme = scheme

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
        """(a1 itself, its weighted copy or its codes, the codes' scales or None, None, None, None)."""
        if not self.scheme.quantised:
            check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
        check_routing(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        local_ids(topk_ids, num_experts, expert_map)  # for its refusals
        rows = weighted_input(a1, topk_weights, topk_ids) if apply_router_weight_on_input else a1
        a1q, a1q_scale = _quant1(rows, self.scheme, a1_scale, a2_scale, num_local_experts(num_experts, expert_map))
        return a1q, a1q_scale, None, None, None

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
        output.copy_(sum_slots(fused_expert_output, topk_ids >= 0, topk_weights, apply_router_weight_on_input))


@dataclass(frozen=True)
class _Sent:
    """What finalize must know of its prepare."""

    topk_ids: Tensor
    row_TK: Tensor
    """int64: expert * rows + position in the batched buffer, -1 where the slot has no row here."""
    num_local: int


def _spread(source: Tensor, rows: int, target: Tensor, tokens: Tensor) -> Tensor:
    """(rows, C) with source[tokens] at `target`. The rest is NaN, or all ones where the dtype has none (e8m0's NaN)."""
    if source.is_floating_point():
        buffer = torch.full((rows, source.size(1)), torch.nan, dtype=source.dtype, device=source.device)
    else:
        buffer = torch.full((rows, source.size(1)), -1, dtype=torch.int8, device=source.device).view(source.dtype)
    # Bytes: indexed stores are not implemented for every narrow dtype.
    if source.dtype.itemsize == 1:
        buffer.view(torch.uint8)[target] = source.view(torch.uint8)[tokens]
    else:
        buffer[target] = source[tokens]
    return buffer


class BatchedPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Batched layout (e, max_rows, hidden): one region per local expert, its rows in (token, slot) order.

    Every live slot takes a row, duplicates too. An expert with more than `max_rows` raises before anything is written.
    Rows beyond an expert's count hold NaN, so that whoever reads them shows it. `max_num_tokens` bounds the tokens of a
    rank, None for no bound.

    State: prepare remembers where each slot went, and the next finalize reads it. Hence one instance serves one layer,
    every prepare is followed by its own finalize, and finalize gets the ids that prepare got. Experts that live on other
    ranks have no row here and contribute 0.
    """

    def __init__(self, max_rows: int, max_num_tokens: int | None = None, scheme: QuantScheme = UNQUANTISED) -> None:
        check(max_rows >= 1, f"max_rows={max_rows} must be at least 1")
        check(max_num_tokens is None or max_num_tokens >= 0, f"max_num_tokens={max_num_tokens} must not be negative")
        self.max_rows = max_rows
        self.max_num_tokens = max_num_tokens
        self.scheme = scheme
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
        """(rows (e, max_rows, hidden), scales or None, counts int32 (e,), None, None). Counts are of (token, slot) pairs.

        Scales lie beside their rows, (e, max_rows, G); one scale for the whole tensor is repeated as (e, 1, 1).
        """
        if not self.scheme.quantised:
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
        codes, scale = _quant1(source, self.scheme, a1_scale, a2_scale, num_local)
        tokens, slots = torch.nonzero(position_TK >= 0, as_tuple=True)
        target = position_TK[tokens, slots]
        buffer = _spread(codes, num_local * rows, target, tokens).view(num_local, rows, codes.size(1))
        self._sent = _Sent(topk_ids.clone(), position_TK, num_local)
        if scale is None:
            return buffer, None, counts, None, None
        assert self.scheme.a1 is not None
        if self.scheme.a1.by_token:
            scale = _spread(scale, num_local * rows, target, tokens).view(num_local, rows, scale.size(1))
        else:
            scale = scale.expand(num_local, 1, 1).contiguous()
        return buffer, scale, counts, None, None

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
        output.copy_(sum_slots(y_TKH, sent.row_TK >= 0, topk_weights, apply_router_weight_on_input))
