"""All-to-all, contiguous: each token travels once to every rank that holds one of its experts, and one sum comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.modular import Prepared
from moeproof.reference.contract.overlap import IN_FLIGHT, Batch, FusedMoEOverlappedPrepareAndFinalize, Step
from moeproof.reference.eager.ranks_common import (
    RankPrepareAndFinalize,
    check_finalize,
    count_local,
    groups_of,
    local_only,
    partial_sum,
)
from moeproof.reference.eager.ranks_exchange import exchange_counts, start_exchange
from moeproof.reference.eager.ranks_message import byte_rows
from moeproof.reference.eager.ranks_quant import Payload

Tensor = torch.Tensor


def destinations(ids_TK: Tensor, groups: Tensor, tp: int, ranks: int) -> tuple[Tensor, Tensor]:
    """(tokens int64 (n,), send int64 (R,)): which tokens go where, by rank and then by token; each at most once to a rank."""
    needed = torch.zeros(ids_TK.size(0), ranks // tp + 1, dtype=torch.bool, device=ids_TK.device)
    needed.scatter_(1, groups + 1, True)  # column 0 takes the slots that are not routed
    by_rank = needed[:, 1:].repeat_interleave(tp, dim=1).T
    return by_rank.nonzero()[:, 1], by_rank.sum(dim=1)


@dataclass
class _Flight(Batch):
    """One micro-batch between its calls."""

    tokens: Tensor = field(default_factory=lambda: torch.empty(0))
    """int64 (n,): this rank's tokens in the order in which they were sent."""
    send: list[int] = field(default_factory=list)
    receive: list[int] = field(default_factory=list)
    shape: tuple[int, int] = (0, 0)
    """Of this rank's own rows: (T, hidden)."""
    payload: Payload | None = None
    """What start_prepare sent."""
    ids: Tensor = field(default_factory=lambda: torch.empty(0))
    """What finish_prepare returned."""
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    wait: Callable[[], list[Tensor]] = list


class AllToAll(RankPrepareAndFinalize, FusedMoEOverlappedPrepareAndFinalize):
    """Standard layout: rows (n, H) of the tokens that some expert of this rank takes, by source rank and then by token.

    Ids, weights and scales travel with their row; returned ids are -1 wherever the expert is not here. One exchange of counts
    and one of rows. finalize sums this rank's slots in float32, and the source adds the sums in rank order and rounds once.
    """

    _flights: tuple[_Flight, ...] = ()
    _current: Batch | None = None
    _started = 0

    def start_prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Batch:
        if len(self._flights) >= IN_FLIGHT:
            raise self.fail(f"{len(self._flights)} micro-batches are in flight, at most {IN_FLIGHT}; finish one first")
        payload = self.begin_prepare(
            a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        )
        grid, link = self.grid, self.link
        tokens, send = destinations(topk_ids, groups_of(topk_ids, grid), grid.tp, grid.ranks)
        receive = exchange_counts(link, send)[:, link.rank].tolist()
        index = tokens.to(torch.int32)
        columns = [index, topk_ids[tokens], topk_weights[tokens], *(_picked(column, tokens) for column in payload.columns)]
        self._started += 1
        flight = _Flight(str(self._started), tokens=tokens, send=send.tolist(), receive=receive, shape=(a1.size(0), a1.size(1)))
        flight.payload = payload
        flight.wait = start_exchange(link, columns, flight.send, receive)
        self._flights = (*self._flights, flight)
        return flight

    def finish_prepare(self, batch: Batch) -> Prepared:
        flight = self._advance(batch, Step.FINISH_PREPARE)
        try:
            index, ids, weights, *arrived = flight.wait()
            _check_order(index, flight.receive)
        except ContractError as error:
            raise self.fail(str(error)) from None
        flight.ids = local_only(ids, self.grid, self.link.rank)
        assert flight.payload is not None, "start_prepare made it"
        rows, scales = flight.payload.received(arrived, (flight.ids >= 0).any(dim=1))
        return rows, scales, count_local(flight.ids, self.grid, self.link.rank), flight.ids, weights

    def start_finalize(
        self,
        batch: Batch,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        flight = self._advance(batch, Step.START_FINALIZE)

        def partial() -> Tensor:
            tokens, hidden = flight.shape
            check_finalize(output, hidden, tokens, topk_weights, topk_ids, flight.ids)
            return partial_sum(fused_expert_output, flight.ids, topk_weights, hidden, apply_router_weight_on_input)

        total = self.agreed(f"start_finalize of micro-batch {flight.name}", partial)
        flight.output = output
        flight.wait = start_exchange(self.link, [total], flight.receive, flight.send)

    def finish_finalize(self, batch: Batch) -> None:
        flight = self._advance(batch, Step.FINISH_FINALIZE)
        self._flights = tuple(f for f in self._flights if f is not flight)
        (sums,) = flight.wait()
        total = torch.zeros(flight.shape, dtype=torch.float32, device=sums.device)
        for tokens, part in zip(flight.tokens.split(flight.send), sums.split(flight.send), strict=True):
            total.index_add_(0, tokens, part)  # a token at most once in a part, so the order of addition is fixed
        flight.output.copy_(total)

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
        """(rows, scales or None, counts int32 (e,), ids, weights)."""
        self._flights, self._current = (), None  # a call that failed half way left its micro-batch behind
        batch = self.start_prepare(
            a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
        )
        self._current = batch
        return self.finish_prepare(batch)

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (n, K, hidden), or empty where nothing arrived; ids and weights as prepare returned them."""
        batch, self._current = self._current, None
        if batch is None:
            raise self.fail("finalize without a prepare before it")
        self.start_finalize(batch, output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input)
        self.finish_finalize(batch)

    def _advance(self, batch: Batch, step: Step) -> _Flight:
        """The micro-batch at its next step. Out of order raises here, and releases the others."""
        flight = next((f for f in self._flights if f is batch), None)
        if flight is None:  # nobody waits for it, so there is nobody to release
            raise ContractError(f"{step} of micro-batch {batch.name}, which is finished or was started elsewhere")
        try:
            flight.advance(step)
        except ContractError as error:
            raise self.fail(str(error)) from None
        return flight


def _picked(column: Tensor, tokens: Tensor) -> Tensor:
    """column (T, .)[tokens], by bytes."""
    return byte_rows(column)[tokens].view(column.dtype)


def _check_order(index: Tensor, receive: list[int]) -> None:
    """Each source's tokens arrive in rising order, so none twice."""
    for rank, part in enumerate(index.split(receive)):
        check(bool((part[1:] > part[:-1]).all()), f"rows of rank {rank} arrived out of order: tokens {part.tolist()}")
