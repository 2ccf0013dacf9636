"""DISPATCH on simulated ranks: which (token, slot) pairs each rank must receive, and what lies there afterwards.

Plain loops over ranks, tokens and slots. Orders here are canonical (source rank, token, slot); the contract leaves the order
of rows open, so a candidate is compared as a set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.experts import input_rows

Tensor = torch.Tensor


@dataclass(frozen=True, order=True)
class Pair:
    """One routed slot: slot `slot` of token `token` (its index on rank `source`), which goes to `expert` (physical)."""

    source: int
    token: int
    slot: int
    expert: int


@dataclass(frozen=True)
class Arrived:
    """What one rank holds after a contiguous dispatch: each token once, however many of its slots are here."""

    source: Tensor
    """int64 (n,): rank that sent the row."""
    token: Tensor
    """int64 (n,): its index there."""
    rows: Tensor
    """(n, H)."""
    ids: Tensor
    """(n, K) physical ids, -1 where the slot is not routed or its expert is not here."""
    weights: Tensor
    """(n, K) float32, as the source had them."""
    counts: Tensor
    """int32 (e,): pairs of each local expert."""


def routed(world: World, ranks: Sequence[Inputs]) -> list[Pair]:
    """Every live slot of the world in canonical order. Identity experts need no rank: they are not here."""
    found, experts = [], world.grid.experts
    for source, inputs in enumerate(ranks):
        for token, row in enumerate(inputs.topk_ids.tolist()):
            found += [Pair(source, token, slot, e) for slot, e in enumerate(row) if 0 <= e < experts]
    return found


def received(world: World, ranks: Sequence[Inputs]) -> list[list[Pair]]:
    """The pairs that each rank must receive. A tensor-parallel group receives a pair on each of its ranks."""
    grid = world.grid
    holders = [grid.holders(expert) for expert in range(grid.experts)]
    at: list[list[Pair]] = [[] for _ in ranks]
    for pair in routed(world, ranks):
        for rank in holders[pair.expert]:
            at[rank].append(pair)
    return at


def sent_tokens(world: World, ranks: Sequence[Inputs]) -> Tensor:
    """int64 (R, R): tokens that each rank (row) sends to each other one (column), deduplicated."""
    sent = torch.zeros(world.ranks, world.ranks, dtype=torch.int64)
    for rank, pairs in enumerate(received(world, ranks)):
        for source, _ in {(p.source, p.token) for p in pairs}:
            sent[source, rank] += 1
    return sent


def pair_counts(world: World, pairs: Sequence[Pair], rank: int) -> Tensor:
    """int32 (e,): how many of the pairs each local expert of `rank` takes."""
    local = world.grid.local(rank)
    counts = [0] * world.grid.experts
    for pair in pairs:
        counts[pair.expert] += 1
    return torch.tensor([counts[e] for e in local], dtype=torch.int32)


def arrived(world: World, ranks: Sequence[Inputs], rank: int, pairs: Sequence[Pair]) -> Arrived:
    """The contiguous layout on `rank`, from all ranks' inputs and the pairs that it must receive."""
    keys = sorted({(p.source, p.token) for p in pairs})
    place = {key: n for n, key in enumerate(keys)}
    p, K = world.problem, ranks[0].topk_ids.shape[1]
    ids = torch.full((len(keys), K), -1, dtype=ranks[0].topk_ids.dtype)
    for pair in pairs:
        ids[place[pair.source, pair.token], pair.slot] = pair.expert
    sent = {source: dispatched_rows(ranks[source]) for source in {source for source, _ in keys}}
    rows = [sent[source][token, 0] for source, token in keys]
    return Arrived(
        source=torch.tensor([source for source, _ in keys], dtype=torch.int64),
        token=torch.tensor([token for _, token in keys], dtype=torch.int64),
        rows=torch.stack(rows) if rows else torch.empty(0, p.H, dtype=p.fmt.dtype),
        ids=ids,
        weights=torch.stack([ranks[s].topk_weights[t] for s, t in keys]) if keys else torch.empty(0, K),
        counts=pair_counts(world, pairs, rank),
    )


def batched(world: World, ranks: Sequence[Inputs], rank: int, pairs: Sequence[Pair]) -> tuple[Tensor, list[list[Pair]]]:
    """The batched layout on `rank`: rows (e, C, H), NaN after the last of each expert, and which pair each row is."""
    p, local = world.problem, world.grid.local(rank)
    regions = [[pair for pair in pairs if pair.expert == e] for e in local]
    sent = {source: dispatched_rows(ranks[source]) for source in {pair.source for pair in pairs}}
    rows = torch.full((len(local), p.rows_per_expert, p.H), torch.nan, dtype=p.fmt.dtype)
    for index, region in enumerate(regions):
        for n, pair in enumerate(region):
            rows[index, n] = sent[pair.source][pair.token, pair.slot]
    return rows, regions


def dispatched_rows(inputs: Inputs) -> Tensor:
    """(T, K, H) in the problem's dtype: what travels, weighted where the weight is on the input."""
    everything = replace(inputs, expert_map=None)  # a slot that lives elsewhere is weighted here all the same
    return input_rows(everything, inputs.hidden_states).to(inputs.hidden_states.dtype)
