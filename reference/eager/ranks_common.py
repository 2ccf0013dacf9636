"""What every prepare/finalize for several ranks does before it sends anything: check, compare with the others, quantise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch

from moeproof.reference.contract.agreement import agree, withdraw
from moeproof.reference.contract.candidate import QUANT1
from moeproof.reference.contract.checks import check_ids
from moeproof.reference.contract.errors import ContractError, check, known
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize
from moeproof.reference.contract.schemes import SCHEMES, QuantScheme
from moeproof.reference.eager.ranks_link import check_size
from moeproof.reference.eager.ranks_quant import Payload, check_scales, send
from moeproof.reference.eager.slots import check_routing, sum_slots, weighted_input

Tensor = torch.Tensor
T = TypeVar("T")
UNQUANTISED = SCHEMES["none"]


class RankPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """Holds the link and the grid; one instance serves one layer of one rank.

    `max_num_tokens` bounds the tokens of every rank, None for no bound. `ids_dtype` is the dtype in which ids must arrive.
    `quant1` is a word of contract.candidate.QUANT1: where the scheme quantises x.
    Whatever one rank refuses raises on all ranks: there the reason itself, elsewhere "rank r refused: reason".
    """

    def __init__(
        self,
        link: Link,
        grid: Grid,
        max_num_tokens: int | None = None,
        ids_dtype: torch.dtype | None = None,
        scheme: QuantScheme = UNQUANTISED,
        quant1: str = "source",
    ) -> None:
        known("quant1", quant1, QUANT1)
        check(max_num_tokens is None or max_num_tokens >= 0, f"max_num_tokens={max_num_tokens} must not be negative")
        self.link, self.grid = link, grid
        self.max_num_tokens, self.ids_dtype = max_num_tokens, ids_dtype
        self.scheme, self.quant1 = scheme, quant1

    def topk_indices_dtype(self) -> torch.dtype | None:
        return self.ids_dtype

    def max_num_tokens_per_rank(self) -> int | None:
        return self.max_num_tokens

    def abandon(self, reason: str) -> None:
        withdraw(self.link, reason)

    def fail(self, reason: str) -> ContractError:
        """To be raised where this rank alone finds that something is wrong, and the others are about to wait for it."""
        self.abandon(reason)
        return ContractError(reason)

    def begin_prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Payload:
        """Collective: raise on every rank, or return what is ready to travel."""
        flag = apply_router_weight_on_input

        def ready() -> Tensor:
            self._check_prepare(a1, topk_weights, topk_ids, num_experts, expert_map, flag)
            check_scales(self.scheme, a1_scale, a2_scale, len(self.grid.local(self.link.rank)), a1)
            return weighted_input(a1, topk_weights, topk_ids) if flag else a1

        def facts() -> dict[str, object]:
            return {
                "dtype": a1.dtype,
                "hidden": a1.size(1),
                "slots": topk_ids.size(1),
                "ids": topk_ids.dtype,
                "weights": topk_weights.dtype,
                "weight on input": flag,
                "placement": self.grid,
                "max tokens": self.max_num_tokens,
                "scheme": self.scheme.name,
                "quant1": self.quant1,
                "a1_scale": None if a1_scale is None else float(a1_scale),
                **self.facts(),
            }

        rows = self.agreed("prepare", ready, facts)
        return send(self.link, rows, self.scheme, a1_scale, self.quant1)

    def _check_prepare(
        self,
        a1: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        check_routing(a1, topk_weights, topk_ids, apply_router_weight_on_input)
        want, bound = self.ids_dtype, self.max_num_tokens
        check(want is None or topk_ids.dtype == want, f"topk_ids is {topk_ids.dtype}, this prepare/finalize needs {want}")
        check(bound is None or a1.size(0) <= bound, f"{a1.size(0)} tokens on this rank, at most {bound} are allowed")
        check_size(self.link, self.grid.ranks)
        self._check_map(num_experts, expert_map)
        check_ids(topk_ids, num_experts)

    def facts(self) -> dict[str, object]:
        """What else must be the same on all ranks."""
        return {}

    def _check_map(self, num_experts: int, expert_map: Tensor | None) -> None:
        grid, rank = self.grid, self.link.rank
        check(
            num_experts == grid.experts,
            f"num_experts={num_experts}, the placement shares {grid.experts} experts; they must be equal",
        )
        want = grid.expert_map(rank)
        got = None if expert_map is None else expert_map.tolist()
        if want is None:
            want = torch.arange(grid.experts)
            got = want.tolist() if got is None else got
        check(
            got == want.tolist(),
            f"expert_map is {got}, the placement gives rank {rank} of {grid.ranks} {want.tolist()}; they must be equal",
        )

    def agreed(self, call: str, work: Callable[[], T], facts: Callable[[], Mapping[str, object]] = dict) -> T:
        """Collective: what this rank's own `work` returns, once every rank's has succeeded; else raise on every rank.

        All that can fail on one rank alone belongs into `work`: after it the ranks are bound to each other.
        """
        result, error = None, None
        shared: dict[str, object] = {"call": f"{type(self).__name__}.{call}"}
        try:
            result = work()
            shared |= facts()
        except Exception as raised:  # whatever it is, the others must hear of it before this rank leaves
            error = raised
        refusal = None if error is None else str(error).strip() or type(error).__name__
        try:
            agree(self.link, shared, refusal)
        except ContractError as joint:
            raise error or joint from None
        return result  # type: ignore[return-value]


def groups_of(ids_TK: Tensor, grid: Grid) -> Tensor:
    """int64 (T, K): the expert-parallel group of each slot's expert, -1 where the slot is not routed."""
    groups = grid.group_of().to(ids_TK.device)
    return torch.where(ids_TK >= 0, groups[ids_TK.clamp(min=0).long()], -1)


def local_only(ids_TK: Tensor, grid: Grid, rank: int) -> Tensor:
    """The same ids with -1 wherever the expert is not on `rank`."""
    return torch.where(groups_of(ids_TK, grid) == grid.ep_rank(rank), ids_TK, -1)


def count_local(ids_TK: Tensor, grid: Grid, rank: int) -> Tensor:
    """int32 (local experts,): (token, slot) pairs of each expert of `rank` among global ids."""
    counts = torch.bincount(ids_TK[ids_TK >= 0].long(), minlength=grid.experts)
    return counts[torch.tensor(grid.local(rank), device=counts.device)].to(torch.int32)


def check_finalize(output: Tensor, hidden: int, tokens: int, topk_weights: Tensor, topk_ids: Tensor, prepared: Tensor) -> None:
    """Of an implementation whose prepare returned ids: finalize must get those, and one output row for each own token."""
    check(
        tuple(output.shape) == (tokens, hidden),
        f"output is {tuple(output.shape)}, must be {(tokens, hidden)}: a row for each token of this rank",
    )
    check(
        topk_ids.shape == prepared.shape and torch.equal(topk_ids, prepared) and topk_weights.shape == topk_ids.shape,
        "finalize got ids that the last prepare did not return; they replace the router's",
    )


def partial_sum(y: Tensor, ids_TK: Tensor, topk_weights: Tensor, hidden: int, weighted_already: bool) -> Tensor:
    """float32 (n, hidden): sum over live slots of w * y, slot by slot. `y` (n, K, hidden), or empty where nothing arrived."""
    if y.numel() == 0:
        return torch.zeros(ids_TK.size(0), hidden, dtype=torch.float32, device=ids_TK.device)
    check(
        tuple(y.shape) == (*ids_TK.shape, hidden),
        f"fused_expert_output is {tuple(y.shape)}, must be {(*ids_TK.shape, hidden)}",
    )
    return sum_slots(y, ids_TK >= 0, topk_weights, weighted_already)
