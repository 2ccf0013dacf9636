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
from moeproof.reference.oracle.quantise import Quantised

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
    """(n, H), or their codes."""
    ids: Tensor
    """(n, K) physical ids, -1 where the slot is not routed or its expert is not here."""
    weights: Tensor
    """(n, K) float32, as the source had them."""
    counts: Tensor
    """int32 (e,): pairs of each local expert."""
    scales: Tensor | None = None
    """(n, G) beside the rows or (1, 1) for all of them, as stored; None where x is not quantised."""


@dataclass(frozen=True)
class Regions:
    """What one rank holds after a batched dispatch."""

    rows: Tensor
    """(e, C, H) or their codes; all bits set after the last of each expert, which is NaN in a floating format."""
    pairs: list[list[Pair]]
    """Of each local expert, in the order of its rows."""
    scales: Tensor | None = None
    """(e, C, G) beside the rows, or one for all of them as (e, 1, 1)."""


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


def arrived(
    world: World, ranks: Sequence[Inputs], rank: int, pairs: Sequence[Pair], operand: Quantised | None = None
) -> Arrived:
    """The contiguous layout on `rank`, from all ranks' inputs, the pairs that it must receive and their quantised operand."""
    keys = sorted({(p.source, p.token) for p in pairs})
    place = {key: n for n, key in enumerate(keys)}
    K = ranks[0].topk_ids.shape[1]
    ids = torch.full((len(keys), K), -1, dtype=ranks[0].topk_ids.dtype)
    for pair in pairs:
        ids[place[pair.source, pair.token], pair.slot] = pair.expert
    first = {(p.source, p.token): n for n, p in reversed(list(enumerate(pairs)))}
    index = torch.tensor([first[key] for key in keys], dtype=torch.int64)
    rows, scales = stored_rows(world, ranks, pairs, operand)
    return Arrived(
        source=torch.tensor([source for source, _ in keys], dtype=torch.int64),
        token=torch.tensor([token for _, token in keys], dtype=torch.int64),
        rows=_picked(rows, index),
        ids=ids,
        weights=torch.stack([ranks[s].topk_weights[t] for s, t in keys]) if keys else torch.empty(0, K),
        counts=pair_counts(world, pairs, rank),
        scales=None if scales is None else _picked(scales, index) if _beside(operand) else scales,
    )


def batched(
    world: World, ranks: Sequence[Inputs], rank: int, pairs: Sequence[Pair], operand: Quantised | None = None
) -> Regions:
    """The batched layout on `rank`."""
    local, C = world.grid.local(rank), world.problem.rows_per_expert
    regions = [[n for n, pair in enumerate(pairs) if pair.expert == e] for e in local]
    places = [e * C + n for e, region in enumerate(regions) for n in range(len(region))]
    index = torch.tensor([n for region in regions for n in region], dtype=torch.int64)

    def spread(column: Tensor) -> Tensor:
        flat = torch.full((len(local) * C, column.shape[1] * column.element_size()), 0xFF, dtype=torch.uint8)
        flat[places] = _picked(column, index).view(torch.uint8)
        return flat.view(column.dtype).view(len(local), C, column.shape[1])

    rows, scales = stored_rows(world, ranks, pairs, operand)
    if scales is not None:
        scales = spread(scales) if _beside(operand) else scales.expand(len(local), 1, 1)
    return Regions(spread(rows), [[pairs[n] for n in region] for region in regions], scales)


def stored_rows(
    world: World, ranks: Sequence[Inputs], pairs: Sequence[Pair], operand: Quantised | None
) -> tuple[Tensor, Tensor | None]:
    """(rows (pairs, .), scales (pairs or 1, G) or None) as they are stored: what has to arrive of each pair."""
    if operand is not None:
        return operand.codes(), operand.scale(world.problem.fmt)
    return pair_rows(world, ranks, pairs), None


def pair_rows(world: World, ranks: Sequence[Inputs], pairs: Sequence[Pair]) -> Tensor:
    """(pairs, H) in the problem's dtype: each pair's token as it leaves, before any quantising."""
    p = world.problem
    sent = {source: dispatched_rows(ranks[source]) for source in {pair.source for pair in pairs}}
    rows = [sent[pair.source][pair.token, pair.slot] for pair in pairs]
    return torch.stack(rows) if rows else torch.empty(0, p.hidden, dtype=p.fmt.dtype, device=ranks[0].device)


def _beside(operand: Quantised | None) -> bool:
    """Whether each row has scales of its own."""
    return operand is not None and operand.quantiser.by_token


def _picked(column: Tensor, index: Tensor) -> Tensor:
    """column (n, ..)[index]. By bytes: not every narrow dtype can be indexed."""
    flat = column.contiguous()
    if not flat.numel():
        return flat[: len(index)]
    return flat.view(torch.uint8)[index.to(flat.device)].view(column.dtype)


def dispatched_rows(inputs: Inputs) -> Tensor:
    """(T, K, H) in the problem's dtype: what travels, weighted where the weight is on the input."""
    everything = replace(inputs, expert_map=None)  # a slot that lives elsewhere is weighted here all the same
    return input_rows(everything, inputs.hidden_states).to(inputs.hidden_states.dtype)
