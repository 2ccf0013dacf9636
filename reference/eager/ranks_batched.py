"""Batched, fixed capacity per expert: every message has the same size whatever the routing, as graph capture needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import Prepared
from moeproof.reference.contract.schemes import QuantScheme
from moeproof.reference.eager.prepare_finalize import check_output
from moeproof.reference.eager.ranks_common import UNQUANTISED, RankPrepareAndFinalize
from moeproof.reference.eager.ranks_exchange import exchange_counts, start_exchange
from moeproof.reference.eager.ranks_message import byte_rows
from moeproof.reference.eager.slots import sum_slots

Tensor = torch.Tensor


@dataclass(frozen=True)
class _Sent:
    """What finalize must know of its prepare."""

    topk_ids: Tensor
    row_STK: Tensor
    """int64: the slot's row of what this rank sent each shard (and gets back), -1 where the slot is not routed."""
    counts_RE: list[list[int]]
    """Rows that each rank sends to each expert."""
    region: int
    """Rows of a (source, expert) region of a message."""
    hidden: int


class BatchedAllToAll(RankPrepareAndFinalize):
    """Batched layout (e, max_rows, H): the rows of an expert in (source rank, token, slot) order, NaN after the last.

    A source sends every expert a region of min(max_rows, max_num_tokens * K) rows, used or not. Every live slot takes a row,
    duplicates too. An expert with more than `max_rows` rows raises on all ranks before any row moves. Unreduced rows come
    back; the source weighs and sums its slots in their order, as one rank alone would. With tensor-parallel shards a row goes
    to each shard of its expert; the shards' rows, each rounded to the dtype by its experts, are summed in float32 first.
    """

    def __init__(
        self,
        link: Link,
        grid: Grid,
        max_rows: int,
        max_num_tokens: int,
        ids_dtype: torch.dtype | None = None,
        scheme: QuantScheme = UNQUANTISED,
        quant1: str = "source",
    ) -> None:
        super().__init__(link, grid, max_num_tokens, ids_dtype, scheme, quant1)
        check(max_rows >= 1, f"max_rows={max_rows} must be at least 1")
        self.max_rows = max_rows
        self._order = [(grid.tp_rank(rank), e) for rank in range(grid.ranks) for e in grid.local(rank)]
        """(shard, expert) in the order of the regions: by rank, then local index."""
        self._sent: _Sent | None = None

    def facts(self) -> dict[str, object]:
        return {"rows per expert": self.max_rows}

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
        """(rows (e, max_rows, .), scales (e, max_rows, G), (e, 1, 1) or None, counts int32 (e,), None, None)."""
        self._sent = None
        payload = self.begin_prepare(
            a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        )
        grid, link = self.grid, self.link
        mine = torch.bincount(topk_ids[topk_ids >= 0].long(), minlength=grid.experts)
        counts_RE = exchange_counts(link, mine)
        self._check_capacity(counts_RE)
        assert self.max_num_tokens is not None
        region = max(min(self.max_rows, self.max_num_tokens * topk_ids.size(1)), 1)
        row_STK = self._rows(topk_ids, region)
        self._sent = _Sent(topk_ids.clone(), row_STK, counts_RE.tolist(), region, a1.size(1))
        shards, tokens, slots = torch.nonzero(row_STK >= 0, as_tuple=True)
        where = row_STK[shards, tokens, slots]
        total = len(self._order) * region
        slot = torch.full((total,), -1, dtype=torch.int32, device=a1.device)
        slot[where] = (tokens * topk_ids.size(1) + slots).to(torch.int32)
        columns = [slot]
        for column in payload.columns:
            source = byte_rows(column)
            spread = torch.zeros(total, source.size(1), dtype=torch.uint8, device=column.device)
            spread[where] = source[tokens]
            columns.append(spread.view(column.dtype).view(total, *column.shape[1:]))
        send, receive = self._splits(region)
        try:
            slot, *arrived = start_exchange(link, columns, send, receive)()
            occupied = (slot >= 0).view(grid.ranks, -1, region)
            self._check_arrived(occupied, counts_RE)
        except ContractError as error:
            raise self.fail(str(error)) from None
        counts = counts_RE[:, grid.local(link.rank)].sum(dim=0).to(a1.device, torch.int32)
        rows, scales = payload.received(arrived, occupied.flatten())
        if scales is None:
            return self._placed(rows, occupied), None, counts, None, None
        assert self.scheme.a1 is not None
        beside = self.scheme.a1.by_token or payload.scales is not None
        placed = self._placed(scales, occupied) if beside else scales.expand(len(counts), 1, 1).contiguous()
        return self._placed(rows, occupied), placed, counts, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (e, max_rows, hidden); ids and weights are the router's. It is not modified."""
        sent, self._sent = self._sent, None

        def returned() -> Tensor:
            if sent is None or not torch.equal(sent.topk_ids, topk_ids):
                raise ContractError("finalize got topk_ids that the last prepare did not; call prepare first")
            check_output(output, topk_weights, topk_ids)
            want = (len(self.grid.local(self.link.rank)), self.max_rows, sent.hidden)
            got = tuple(fused_expert_output.shape)
            check(got == want, f"fused_expert_output is {got}, must be {want}")
            check(output.size(1) == sent.hidden, f"output has {output.size(1)} columns, must have {sent.hidden}")
            return self._to_sources(fused_expert_output, sent)

        rows = self.agreed("finalize", returned)
        assert sent is not None
        send, receive = self._splits(sent.region)
        (back,) = start_exchange(self.link, [rows], receive, send)()
        y_TKH = back[sent.row_STK.clamp(min=0)].float().sum(dim=0)
        output.copy_(sum_slots(y_TKH, sent.row_STK[0] >= 0, topk_weights, apply_router_weight_on_input))

    def _check_capacity(self, counts_RE: Tensor) -> None:
        """The same on every rank, since all see the same counts."""
        total = counts_RE.sum(dim=0)
        if bool((total > self.max_rows).any()):
            expert = int((total > self.max_rows).nonzero()[0])
            raise ContractError(
                f"expert {expert} gets {int(total[expert])} rows ({counts_RE[:, expert].tolist()} by rank), its region of the "
                f"batched layout holds {self.max_rows}; nothing was sent"
            )

    def _rows(self, topk_ids: Tensor, region: int) -> Tensor:
        """int64 (S, T, K): row of each slot in this rank's message to each shard, in (token, slot) order inside a region; -1
        where none."""
        row_STK = torch.full((self.grid.tp, *topk_ids.shape), -1, dtype=torch.int64, device=topk_ids.device)
        for place, (shard, expert) in enumerate(self._order):
            here = topk_ids == expert
            row_STK[shard][here] = place * region + torch.arange(int(here.sum()), device=topk_ids.device)
        return row_STK

    def _splits(self, region: int) -> tuple[list[int], list[int]]:
        """(rows to each rank, rows from each rank): they depend on the placement only."""
        local = [len(self.grid.local(rank)) * region for rank in range(self.grid.ranks)]
        return local, [local[self.link.rank]] * self.grid.ranks

    def _check_arrived(self, occupied: Tensor, counts_RE: Tensor) -> None:
        got = occupied.sum(dim=2).cpu()
        want = counts_RE[:, self.grid.local(self.link.rank)]
        wrong = (got != want).nonzero().tolist()
        if wrong:
            rank, local = wrong[0]
            expert = self.grid.local(self.link.rank)[local]
            declared = int(want[rank, local])
            raise ContractError(f"rank {rank} declared {declared} rows for expert {expert} and sent {int(got[rank, local])}")

    def _placed(self, column: Tensor, occupied: Tensor) -> Tensor:
        """(R * e * region, ..) as received -> (e, max_rows, ..): occupied rows of all sources, 0xFF bytes after them."""
        by_source = byte_rows(column).view(*occupied.shape, -1)
        e = occupied.size(1)
        out = torch.full((e, self.max_rows, by_source.size(-1)), 0xFF, dtype=torch.uint8, device=column.device)
        for expert in range(e):
            rows = by_source[:, expert][occupied[:, expert]]
            out[expert, : rows.size(0)] = rows
        return out.view(column.dtype).view(e, self.max_rows, *column.shape[1:])

    def _to_sources(self, y_eCH: Tensor, sent: _Sent) -> Tensor:
        """(R * e * region, hidden): each source's rows, in the regions it sent them in; zeros where it sent none."""
        R, e, local = self.grid.ranks, y_eCH.size(0), self.grid.local(self.link.rank)
        out = torch.zeros(R, e, sent.region, y_eCH.size(2), dtype=y_eCH.dtype, device=y_eCH.device)
        for index, expert in enumerate(local):
            first = 0
            for rank in range(R):
                count = sent.counts_RE[rank][expert]
                out[rank, index, :count] = y_eCH[index, first : first + count]
                first += count
        return out.view(R * e * sent.region, -1)
