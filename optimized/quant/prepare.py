"""QUANT1 and [Dispatch] of the seed's interfaces on one rank: quantise all rows, then move codes and scales together."""

from __future__ import annotations

import torch

from moeproof.optimized.dispatch import move_rows
from moeproof.optimized.prepare_finalize import Prepared, TritonBatchedPrepareFinalize, TritonNoEPPrepareFinalize
from moeproof.optimized.quant.quantise import as_bytes, quantise
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import format_of
from moeproof.reference.contract.quant_checks import check_static_scale
from moeproof.reference.contract.schemes import QuantScheme

Tensor = torch.Tensor


def weighted_rows(x_TH: Tensor, weights_T1: Tensor, ids_T1: Tensor) -> Tensor:
    """(T, H): x times its token's weight, rounded once to the dtype. Rows that are not routed are zeros.

    Not only where the weight is a number: what stands in such a row must not enter the scale of a whole tensor.
    """
    check(
        ids_T1.size(1) == 1,
        f"apply_router_weight_on_input with topk={ids_T1.size(1)}: allowed only for one slot per token",
    )
    out = torch.zeros(x_TH.shape, dtype=x_TH.dtype, device=x_TH.device)
    place = torch.arange(x_TH.size(0), dtype=torch.int32, device=x_TH.device)
    move_rows(x_TH, out, 1, rows=torch.where(ids_T1.flatten() >= 0, place, -1), weights_TK=weights_T1)
    return out


def quantised_rows(
    scheme: QuantScheme, x_TH: Tensor, a1_scale: Tensor | None, weights_TK: Tensor, ids_TK: Tensor, weight_on_input: bool
) -> tuple[Tensor, Tensor | None]:
    """QUANT1: (codes, scales) of every row of x, whether it is routed here or not; (x, None) where scheme.a1 is None."""
    check_static_scale("a1_scale", scheme.a1, a1_scale, 0, x_TH.device)
    rows = weighted_rows(x_TH, weights_TK, ids_TK) if weight_on_input else x_TH
    if scheme.a1 is None:
        return rows, None
    return quantise(rows, scheme.a1, format_of(x_TH.dtype), a1_scale)


class QuantNoEPPrepareFinalize(TritonNoEPPrepareFinalize):
    """Standard layout: codes (M, K) and their scales stay in token order, and the experts gather them."""

    def __init__(self, scheme: QuantScheme) -> None:
        super().__init__()
        self.scheme = scheme

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
        self._map = (num_experts, expert_map)
        codes, scale = quantised_rows(self.scheme, a1, a1_scale, topk_weights, topk_ids, apply_router_weight_on_input)
        return codes, scale, None, None, None


class QuantBatchedPrepareFinalize(TritonBatchedPrepareFinalize):
    """Batched layout: each local expert's region holds its rows' codes, and its rows' scales at the same places."""

    def __init__(self, scheme: QuantScheme, max_rows: int, num_local_experts: int, max_num_tokens: int | None = None) -> None:
        super().__init__(max_rows, num_local_experts, max_num_tokens)
        self.scheme = scheme

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
        """(codes (e, C, K), scales (e, 1, 1), (e, C, 1) or (e, C, G), counts, None, None). Overflow as in the base class."""
        codes, scale = quantised_rows(self.scheme, a1, a1_scale, topk_weights, topk_ids, apply_router_weight_on_input)
        # The weight is in the codes already: the base class only moves them.
        rows, _, counts, _, _ = super().prepare(
            as_bytes(codes), None, None, topk_weights, topk_ids, num_experts, expert_map, False
        )
        rows = rows.view(codes.dtype)
        if scale is None:
            return rows, None, counts, None, None
        e, C = rows.shape[:2]
        assert self.scheme.a1 is not None
        if not self.scheme.a1.by_token:
            return rows, scale.expand(e, 1, 1), counts, None, None
        moved = torch.empty(e, C, scale.size(1), dtype=scale.dtype, device=scale.device)
        move_rows(as_bytes(scale), as_bytes(moved).flatten(0, 1), topk_ids.size(1), rows=self._rows)
        return rows, moved, counts, None, None
