"""The standard layout in two halves each: one micro-batch travels on a stream of its own while another is computed.

Each of the two micro-batches in flight has an exchange to itself, so that each keeps its own meetings in step. What travels
shares one stream, on which all ranks put the same kernels in the same order: none can wait for one that stands behind it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from moeproof.optimized.symm.cuts import Cuts, beside
from moeproof.optimized.symm.layout import Payload
from moeproof.optimized.symm.prepare_finalize import UNQUANTISED, SymmStandardPrepareFinalize
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import Prepared
from moeproof.reference.contract.overlap import IN_FLIGHT, Batch, FusedMoEOverlappedPrepareAndFinalize, Step
from moeproof.reference.contract.schemes import QuantScheme

Tensor = torch.Tensor
CUTS = beside(1 / 4)
"""Of what was measured on two H100s the least time in all (docs/ranks.md, Measured): copies gained nothing, fewer lost more."""


@dataclass
class _Flight(Batch):
    """One micro-batch between its calls."""

    half: int = 0
    """The exchange that carries it."""
    prepared: Prepared | None = None
    done: torch.cuda.Event | None = None
    """On the travelling stream, after what was started last."""
    alive: list[Tensor] = field(default_factory=list)
    """What kernels on the other stream may still read: nobody else gets its memory before the flight has ended."""


class SymmOverlappedPrepareFinalize(FusedMoEOverlappedPrepareAndFinalize):
    """`max_num_tokens` bounds the tokens of a rank, and half of it, rounded up, those of a micro-batch.

    Micro-batches come in pairs, as FusedMoEOverlappedKernel makes them: a rank that cannot go on stays away from both.
    """

    def __init__(
        self,
        link: Link,
        grid: Grid,
        max_num_tokens: int,
        payload: Payload,
        scheme: QuantScheme = UNQUANTISED,
        cuts: Cuts = CUTS,
    ) -> None:
        half = (max_num_tokens + 1) // 2
        self._halves = [
            SymmStandardPrepareFinalize(link, grid, half, payload, scheme, cuts=cuts, half=n) for n in range(IN_FLIGHT)
        ]
        for part in self._halves:
            part.exchange.owner = weakref.WeakMethod(self.abandon)
        self._stream = torch.cuda.Stream(link.device, priority=-1) if link.device.type == "cuda" else None
        self._flights: tuple[_Flight, ...] = ()
        self._begun = 0
        """Micro-batches of this pair that have been started."""
        self._max_num_tokens, self._started = max_num_tokens, 0

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self._max_num_tokens

    def abandon(self, reason: str) -> None:
        """Leave this pair of micro-batches, those that the others have still to start included.

        Meetings are joined in the order in which the others come to them: all first ones, then all second ones.
        """
        left = [h.exchange for n, h in enumerate(self._halves) if h.exchange.tokens is not None or n >= self._begun]
        self._flights, self._begun = (), 0
        with self._travelling():
            for exchange in left:
                exchange.withdraw_rows(reason)
            for exchange in left:
                exchange.withdraw_sums()

    def settle(self) -> None:
        reasons = []
        for half in self._halves:
            try:
                half.settle()
            except ContractError as error:
                reasons.append(str(error))
        if reasons:
            self._flights, self._begun = (), 0
            raise ContractError(reasons[0])

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
            raise self._fail(f"{IN_FLIGHT} micro-batches are in flight, at most {IN_FLIGHT}; finish one first")
        self._started += 1
        self._begun %= IN_FLIGHT  # the next pair may begin while the last one's second is in flight
        taken = {flight.half for flight in self._flights}
        free = next(n for n in (self._begun, *range(IN_FLIGHT)) if n not in taken)
        flight = _Flight(str(self._started), half=free, alive=[a1, topk_weights, topk_ids])
        with self._travelling(flight):
            flight.prepared = self._halves[free].prepare(
                a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input
            )
        self._begun += 1
        self._flights = (*self._flights, flight)
        return flight

    def finish_prepare(self, batch: Batch) -> Prepared:
        flight = self._advance(batch, Step.FINISH_PREPARE)
        self._wait(flight)
        assert flight.prepared is not None, "start_prepare made it"
        return flight.prepared

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
        flight.alive += [output, fused_expert_output, topk_weights, topk_ids]
        with self._travelling(flight):
            self._halves[flight.half].finalize(
                output, fused_expert_output, topk_weights, topk_ids, apply_router_weight_on_input
            )

    def finish_finalize(self, batch: Batch) -> None:
        flight = self._advance(batch, Step.FINISH_FINALIZE)
        self._wait(flight)
        self._flights = tuple(f for f in self._flights if f is not flight)
        if not self._flights and self._begun == IN_FLIGHT:
            self._begun = 0

    def prepare(self, *_: object, **__: object) -> Prepared:
        raise ContractError("this prepare/finalize has two halves; SymmStandardPrepareFinalize has one")

    def finalize(self, *_: object, **__: object) -> None:
        raise ContractError("this prepare/finalize has two halves; SymmStandardPrepareFinalize has one")

    @contextmanager
    def _travelling(self, flight: _Flight | None = None) -> Iterator[None]:
        """On the other stream, after all that this one has to do so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            yield
            if flight is not None:
                flight.done = torch.cuda.Event()
                flight.done.record()

    def _wait(self, flight: _Flight) -> None:
        if flight.done is not None:
            torch.cuda.current_stream().wait_event(flight.done)

    def _advance(self, batch: Batch, step: Step) -> _Flight:
        """The micro-batch at its next step. Out of order raises here, and releases the others."""
        flight = next((f for f in self._flights if f is batch), None)
        if flight is None:  # nobody waits for it, so there is nobody to release
            raise ContractError(f"{step} of micro-batch {batch.name}, which is finished or was started elsewhere")
        try:
            flight.advance(step)
        except ContractError as error:
            raise self._fail(str(error)) from None
        return flight

    def _fail(self, reason: str) -> ContractError:
        self.abandon(reason)
        return ContractError(reason)
