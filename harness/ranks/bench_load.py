"""What the benchmark of ranks moves: the routing of one call, and how many rows must go from each rank to each other.

The bytes that must move are a property of the call and the layout, not of who moves them: one row for every (token, other
rank that holds one of its experts) in the standard layout, one for every slot whose expert is elsewhere in the batched one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from moeproof.harness.cases import routing
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.ranks.tags import tag
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
CPU = torch.device("cpu")
ROOM = 16
"""A batched region is sized for the fullest expert of the call, rounded up to a multiple of this."""


@dataclass(frozen=True)
class Load:
    """One call of a world as a case. `case.problem.T` counts the tokens of all ranks."""

    case: Case
    device: torch.device = CPU

    @cached_property
    def routing(self) -> tuple[Tensor, Tensor]:
        """(ids int32 (T, K), weights float32 (T, K)) of all ranks' tokens, the same wherever they are drawn."""
        case = self.case
        return routing.make(case.problem, case.routing, case.values, Stream(case.seed, "routing", self.device))

    @cached_property
    def source(self) -> Tensor:
        """int64 (T,): the rank that holds each token."""
        world = self.case.world
        return torch.repeat_interleave(torch.arange(world.ranks), torch.tensor(world.tokens)).to(self.device)

    @cached_property
    def target(self) -> Tensor:
        """int64 (T, K): the rank that holds each slot's expert, -1 where the slot is not routed."""
        ids = self.routing[0].long()
        return torch.where(ids >= 0, self.case.world.grid.group_of().to(self.device)[ids.clamp(min=0)], -1)

    @cached_property
    def needed(self) -> Tensor:
        """bool (T, R): the token has an expert on that rank."""
        return (self.target[:, :, None] == torch.arange(self.case.ranks, device=self.device)).any(dim=1)

    def token_rows(self) -> Tensor:
        """int64 (R, R): rows from each rank (row) to each (column) where a token travels once to a rank."""
        sent = torch.zeros(self.case.ranks, self.case.ranks, dtype=torch.int64, device=self.device)
        return sent.index_add_(0, self.source, self.needed.long()).cpu()

    def slot_rows(self) -> Tensor:
        """int64 (R, R): the same where every slot has a row of its own."""
        ranks = torch.arange(self.case.ranks, device=self.device)
        slots = (self.target[:, :, None] == ranks).sum(dim=1)
        sent = torch.zeros(self.case.ranks, self.case.ranks, dtype=torch.int64, device=self.device)
        return sent.index_add_(0, self.source, slots).cpu()

    def must_move(self) -> int:
        """Bytes that some rank must send or receive, the busiest direction of the busiest rank. Rows only."""
        p = self.case.problem
        rows = self.slot_rows() if p.layout == "batched" else self.token_rows()
        return busiest(rows) * p.H * p.fmt.dtype.itemsize

    def triples(self, rank: int) -> Tensor:
        """int64 (m, 3): (source, token there, expert) of every slot that must arrive on `rank`."""
        token, slot = (self.target == rank).nonzero(as_tuple=True)
        first = torch.tensor([self.case.world.rows(r).start for r in range(self.case.ranks)], device=self.device)
        source = self.source[token]
        return torch.stack([source, token - first[source], self.routing[0][token, slot].long()], dim=1)

    def inputs(self, rank: int) -> Inputs:
        """One rank's Inputs: tagged tokens, and weights of experts that nobody multiplies with."""
        world = self.case.world
        p, rows = world.rank_problem(rank), world.rows(rank)
        ids, weights = self.routing
        e, dtype, mapping = len(world.grid.local(rank)), p.fmt.dtype, world.grid.expert_map(rank)
        return Inputs(
            problem=p,
            hidden_states=tag(rank, p.T, p.H, dtype, self.device),
            topk_ids=ids[rows].clone(),
            topk_weights=weights[rows].clone(),
            w1=torch.zeros(e, p.N, p.H, dtype=dtype, device=self.device),
            w2=torch.zeros(e, p.H, p.I, dtype=dtype, device=self.device),
            expert_map=None if mapping is None else mapping.to(self.device),
        )


def busiest(rows: Tensor) -> int:
    """Rows of the busiest direction: what a rank keeps does not travel."""
    travel = rows.clone().fill_diagonal_(0)
    return int(torch.maximum(travel.sum(dim=0), travel.sum(dim=1)).max())


def full_size(problem: Problem, ranks: int, layout: str, seed: int = 0) -> Case:
    """The case that is timed: `problem` in this layout, the batched one with room for the fullest expert."""
    case = Case(replace(problem, layout=layout), values="sat", ranks=ranks, seed=seed)
    if layout != "batched":
        return case
    ids = Load(case).routing[0]
    fullest = int(torch.bincount(ids[ids >= 0].long(), minlength=1).max())
    return case.with_problem(capacity=max(-(-fullest // ROOM) * ROOM, ROOM))
