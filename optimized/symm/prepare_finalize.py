"""The seed's [Quantise-Dispatch] and [Combine] between ranks by one-sided puts, in both layouts. Graph-capturable."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from moeproof.optimized.prepare_finalize import check_unquantised
from moeproof.optimized.quant.prepare import quantised_rows
from moeproof.optimized.symm.arrange import Arrangement
from moeproof.optimized.symm.cuts import ALONE, Cuts
from moeproof.optimized.symm.exchange import PATIENCE, Exchange, Received
from moeproof.optimized.symm.layout import Layout, Payload
from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize, Prepared
from moeproof.reference.contract.schemes import SCHEMES, QuantScheme

Tensor = torch.Tensor
UNQUANTISED = SCHEMES["none"]
WORD = 4
"""Bytes of the widest integers that rows are moved as."""


class _Symmetric(FusedMoEPrepareAndFinalize):
    """What both layouts share. One instance serves one layer on one rank; making it is collective.

    `max_num_tokens` bounds the tokens of every rank: the arenas are made for it. Ids of no expert are slots that are not
    routed. What a kernel finds wrong is raised by `settle`, or by the next prepare; the output of that call is NaN.
    """

    def __init__(
        self,
        link: Link,
        grid: Grid,
        max_num_tokens: int,
        payload: Payload,
        scheme: QuantScheme = UNQUANTISED,
        patience: float = PATIENCE,
        cuts: Cuts = ALONE,
        max_rows: int = 2**31 - 1,
        **facts: object,
    ) -> None:
        check(max_num_tokens >= 0, f"max_num_tokens={max_num_tokens} must not be negative")
        self.grid, self.rank, self.scheme = grid, link.rank, scheme
        self.max_num_tokens = max_num_tokens
        layout = Layout(grid, payload, max(max_num_tokens, 1))
        facts |= {"kind": type(self).__name__, "max tokens": max_num_tokens, "scheme": scheme.name}
        self.exchange = Exchange(link, layout, facts, patience, cuts, max_rows)
        self.payload = payload
        self._known_map: Tensor | None = None
        """The expert map that has been looked at: reading it would wait for the device."""
        self._accepted: tuple[object, ...] = ()
        """What the arguments of the last prepare looked like."""
        self._as_they_are = False
        """Whether its rows needed nothing done to them."""
        self._returned: tuple[object, ...] = ()
        """The same of the last finalize."""
        self._local = grid.local(link.rank)
        map_of_grid = grid.expert_map(link.rank)
        self._map = None if map_of_grid is None else map_of_grid.to(link.device)

    def topk_indices_dtype(self) -> torch.dtype | None:
        return None

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def abandon(self, reason: str) -> None:
        self.exchange.withdraw(reason)

    def settle(self) -> None:
        self.exchange.settle()

    def send(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        weight_on_input: bool,
    ) -> Received:
        """Check, weigh, quantise and put. Whatever is refused here is told to the other ranks before it is raised.

        What looks like the last call is not checked again: the words of refusals that do not come cost more than a launch.
        """
        looks = (
            *(_looks(a1), _looks(topk_weights), _looks(topk_ids), a1_scale is None, a2_scale is None),
            *(num_experts, weight_on_input, a1.data_ptr() % WORD),
        )
        known = looks == self._accepted and expert_map is self._known_map
        if known and self._as_they_are:
            return self.exchange.dispatch(a1, None, topk_ids, topk_weights)
        try:
            if not known:
                self._check(a1, topk_weights, topk_ids, num_experts, expert_map, weight_on_input)
            if not self.scheme.quantised:
                check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
            rows, scales = quantised_rows(self.scheme, a1, a1_scale, topk_weights, topk_ids, weight_on_input)
            rows = _travels(rows, "rows", self.payload.columns, self.payload.dtype)
            # One scale for all rows is known everywhere: it does not travel.
            beside = None
            if self.payload.scale_columns:
                assert scales is not None, "the scheme has a scale in each row"
                beside = _travels(scales, "scales", self.payload.scale_columns, self.payload.scale_dtype)
        except Exception as error:  # whatever it is, the others must not wait for this rank
            self.exchange.refuse(str(error).strip() or type(error).__name__)
            raise
        self._accepted, self._known_map, self._as_they_are = looks, expert_map, rows is a1 and scales is None
        got = self.exchange.dispatch(rows, beside, topk_ids, topk_weights)
        return got if beside is not None else replace(got, scales=scales)

    def _check(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        weight_on_input: bool,
    ) -> None:
        """Metadata only, but for the contents of a map that was not there before."""
        p, tokens, here = self.payload, a1.size(0), self.exchange.own.device
        check(a1.dim() == 2 and a1.size(1) == p.hidden, f"a1 is {tuple(a1.shape)}, must be (tokens, {p.hidden})")
        check(tokens <= self.max_num_tokens, f"{tokens} tokens on this rank, at most {self.max_num_tokens} are allowed")
        for name, t in (("a1", a1), ("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            check(t.device == here, f"{name} is on {t.device}, this rank's exchange is on {here}")
        for name, t in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
            check(tuple(t.shape) == (tokens, p.slots), f"{name} is {tuple(t.shape)}, must be {(tokens, p.slots)}")
        check(topk_ids.dtype in (torch.int32, torch.int64), f"topk_ids is {topk_ids.dtype}, must be torch.int32 or torch.int64")
        check(topk_weights.dtype.is_floating_point, f"topk_weights is {topk_weights.dtype}, must be a floating dtype")
        check(
            not weight_on_input or p.slots == 1,
            f"apply_router_weight_on_input with topk={p.slots}: allowed only for one slot per token",
        )
        check(
            num_experts == self.grid.experts,
            f"num_experts={num_experts}, the placement shares {self.grid.experts} experts; they must be equal",
        )
        check(expert_map is not None or self._map is None, "expert_map is None, but the experts are shared out")
        if expert_map is not None and expert_map is not self._known_map:
            want = [*range(self.grid.experts)] if self._map is None else self._map.tolist()
            whose = f"rank {self.rank} of {self.grid.ranks}"
            got = expert_map.tolist()
            check(got == want, f"expert_map is {got}, the placement gives {whose} {want}; they must be equal")

    def check_output(self, output: Tensor, topk_weights: Tensor) -> None:
        tokens = self.exchange.tokens
        assert tokens is not None, "the exchange has begun a call"
        check(
            tuple(output.shape) == (tokens, self.payload.hidden),
            f"output is {tuple(output.shape)}, must be {(tokens, self.payload.hidden)}: a row for each token of this rank",
        )
        check(topk_weights.dim() == 2, f"topk_weights has {topk_weights.dim()} dims, must have 2")


class SymmStandardPrepareFinalize(_Symmetric):
    """Standard layout: (R * most, H) rows, `most` for each source rank; token t of rank s is row s * most + t.

    A token travels once to each rank that holds one of its experts; rows that did not come have the ids -1 and hold anything.
    Rows, ids and weights are the arena itself: they hold until finalize.
    """

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
        """(rows, scales (R * most, G), (1, 1) or None, counts int32 (e,), ids int32, weights float32)."""
        got = self.send(a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input)
        return got.rows, got.scales, got.counts, got.ids, got.weights

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (R * most, K, hidden); ids and weights as prepare returned them."""
        lay, p = self.exchange.layout, self.payload
        weighted = not apply_router_weight_on_input
        self.exchange.check_begun()
        looks = (_looks(output), _looks(fused_expert_output), _looks(topk_weights), _looks(topk_ids), self.exchange.tokens)
        if looks != self._returned:
            try:
                self.check_output(output, topk_weights)
                want = (lay.rows, p.slots, p.hidden)
                got = tuple(fused_expert_output.shape)
                check(got == want, f"fused_expert_output is {got}, must be {want}")
                check(
                    tuple(topk_ids.shape) == want[:2] and topk_weights.shape == topk_ids.shape,
                    "finalize got ids that the last prepare did not return; they replace the router's",
                )
            except ContractError as error:
                raise self.exchange.fail(str(error)) from None
            self._returned = looks
        y = fused_expert_output.contiguous().view(-1, p.hidden)
        self.exchange.combine(output, y, topk_ids.contiguous(), topk_weights.contiguous(), weighted)


class SymmBatchedPrepareFinalize(_Symmetric):
    """Batched layout (e, max_rows, H): rows of an expert in (source rank, token, slot) order.

    A token still travels once to a rank; there its row is copied to each of its experts' regions, which memory does faster
    than any link. An expert with more than `max_rows` rows fails the call on all ranks.
    """

    def __init__(self, link: Link, grid: Grid, max_rows: int, max_num_tokens: int, payload: Payload, **more: object) -> None:
        check(max_rows >= 1, f"max_rows={max_rows} must be at least 1")
        facts = {"rows per expert": max_rows, **more}
        super().__init__(link, grid, max_num_tokens, payload, max_rows=max_rows, **facts)  # type: ignore[arg-type]
        self.max_rows = max_rows
        self._arrange = Arrangement(self.exchange, len(self._local), max_rows, self._map)
        self._arrange()  # loads the kernels of this layout too, before any rank waits

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
        got = self.send(a1, a1_scale, a2_scale, topk_weights, topk_ids, num_experts, expert_map, apply_router_weight_on_input)
        rows, scales = self._arrange()
        if scales is None and got.scales is not None:
            scales = got.scales.expand(len(self._local), 1, 1)
        return rows, scales, got.counts, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """`fused_expert_output` (e, max_rows, hidden). Weights are those that travelled with the tokens."""
        p, got = self.payload, self.exchange.received
        weighted = not apply_router_weight_on_input
        self.exchange.check_begun()
        looks = (_looks(output), _looks(fused_expert_output), topk_weights.dim(), self.exchange.tokens)
        if looks != self._returned:
            try:
                self.check_output(output, topk_weights)
                want = (len(self._local), self.max_rows, p.hidden)
                shape = tuple(fused_expert_output.shape)
                check(shape == want, f"fused_expert_output is {shape}, must be {want}")
            except ContractError as error:
                raise self.exchange.fail(str(error)) from None
            self._returned = looks
        y = fused_expert_output.contiguous().view(-1, p.hidden)
        self.exchange.combine(output, y, got.ids, got.weights, weighted, self._arrange.places)


def _looks(t: Tensor) -> tuple[object, ...]:
    """All of a tensor that a check or a kernel depends on, but for where it begins."""
    return t.shape, t.stride(), t.dtype, t.device


def _travels(rows: Tensor, name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows as the exchange was made for, each of which begins where a word of it does."""
    if rows.shape[1:] != (columns,) or rows.dtype != dtype:
        got = f"{tuple(rows.shape)} {rows.dtype}"
        raise ContractError(f"{name} to send are {got}, this exchange was made for (tokens, {columns}) {dtype}")
    word = math.gcd(columns * dtype.itemsize, WORD)
    if rows.stride(1) == 1 and rows.data_ptr() % word == 0 and rows.stride(0) * dtype.itemsize % word == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)
