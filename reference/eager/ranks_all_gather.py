"""All-gather / reduce-scatter: every rank sees every token, and sums are shared out again. The simple DP + EP."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.modular import Prepared
from moeproof.reference.eager.ranks_common import (
    RankPrepareAndFinalize,
    check_finalize,
    count_local,
    local_only,
    partial_sum,
)
from moeproof.reference.eager.ranks_message import fields_of, pack, unpack

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Gathered:
    """What finalize must know of its prepare."""

    ids: Tensor
    tokens: int
    """Of this rank."""
    hidden: int


class AllGatherReduceScatter(RankPrepareAndFinalize):
    """Standard layout: rows (R * most, H), `most` being the largest token count; the same rows on every rank.

    A rank with fewer tokens fills up with cleared rows: zeros, ids -1, weights 0. Returned ids are -1 wherever the expert is
    not here. finalize sums this rank's slots in float32 and the ranks' sums in float32, and rounds once.
    """

    _gathered: _Gathered | None = None

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
        """(rows, scales or None, counts int32 (e,), ids, weights) of all ranks' tokens in rank order."""
        self._gathered = None
        payload = self.begin_prepare(
            a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        )
        link, T = self.link, a1.size(0)
        most = int(link.all_gather(torch.tensor([T], device=link.device)).max())
        if most < T:
            raise self.fail(f"the counts of all ranks say {most} tokens at most, and there are {T} on this rank")
        columns = [topk_ids, topk_weights, *payload.columns]
        message = pack([_filled_up(c, most, -1 if c is topk_ids else 0) for c in columns])
        gathered = link.all_gather(message).flatten(0, 1)
        (ids, weights, *arrived), sealed = unpack(gathered, fields_of(columns))
        if not bool(sealed.all()):
            rank = int((~sealed).nonzero()[0]) // most
            raise self.fail(f"{int((~sealed).sum())} gathered rows are not what was sent, the first from rank {rank}")
        ids = local_only(ids, self.grid, link.rank)
        self._gathered = _Gathered(ids, T, a1.size(1))
        rows, scales = payload.received(arrived, (ids >= 0).any(dim=1))
        return rows, scales, count_local(ids, self.grid, link.rank), ids, weights

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (R * most, K, hidden); ids and weights as prepare returned them. `output` (T, hidden)."""
        state, self._gathered = self._gathered, None

        def partial() -> Tensor:
            if state is None:
                raise ContractError("finalize without a prepare before it")
            check_finalize(output, state.hidden, state.tokens, topk_weights, topk_ids, state.ids)
            return partial_sum(fused_expert_output, state.ids, topk_weights, state.hidden, apply_router_weight_on_input)

        total = self.agreed("finalize", partial).unflatten(0, (self.link.size, -1))
        output.copy_(self.link.reduce_scatter(total)[: output.size(0)])


def _filled_up(column: Tensor, rows: int, value: int) -> Tensor:
    """`column` (n, ..) with rows of `value` after it, (rows, ..)."""
    missing = rows - column.size(0)
    # zeros exists for every dtype, full and fill not for fp8.
    more = torch.zeros(missing, *column.shape[1:], dtype=column.dtype, device=column.device)
    if value:
        more.fill_(value)
    return torch.cat([column, more])
