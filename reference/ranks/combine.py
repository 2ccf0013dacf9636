"""COMBINE on simulated ranks: what every rank's own tokens end with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import Format
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.bounds import U32, combine_error
from moeproof.reference.oracle.chain import Spread, finish, quantised_experts, quantised_rows, shared_expert, spreads
from moeproof.reference.oracle.combine import routed_sum
from moeproof.reference.oracle.products import decoded
from moeproof.reference.oracle.quantise import Quantised
from moeproof.reference.oracle.rounding import lowest_bit
from moeproof.reference.oracle.value import Value, stored
from moeproof.reference.ranks.alone import alone
from moeproof.reference.ranks.dispatch import Pair, pair_rows
from moeproof.reference.ranks.split import rank_inputs

Tensor = torch.Tensor


def rank_outputs(world: World, whole: Inputs, claims: Claims) -> list[Value]:
    """out (T, H) of every rank's tokens of an unquantised layer, with the bound propagated from the inputs.

    One rank alone computes the same sum: experts elsewhere, replicas and order change nothing but rounding, which the bound
    covers. Tensor-parallel shards are summed: each brings its own rounding of y. Shared and identity experts are replicated,
    and enter once.
    """
    every = _summed([spreads(shard, claims)["out"] for shard in _shards(world, whole)], whole.problem.fmt, claims)
    assert every.bound is not None
    return [Value(every.value[rows], every.bound[rows], None, every.fmt) for rows in map(world.rows, range(world.ranks))]


def quantised_outputs(
    world: World,
    ranks: Sequence[Inputs],
    at: Sequence[Sequence[Pair]],
    operands: Sequence[Quantised | None],
    claims: Claims,
) -> list[Value]:
    """The same of a quantised layer, rank by rank: QUANT2 sees what a rank computes of the pairs it received, and no more.

    `operands` are what those pairs must bring (ranks.quant1.arriving).
    """
    homes = [home_inputs(inputs) for inputs in ranks]
    shards = [[_nothing(home) for _ in range(world.tp)] for home in homes]
    for rank, (pairs, operand) in enumerate(zip(at, operands, strict=True)):
        here = alone(ranks[rank], pairs, pair_rows(world, ranks, pairs))
        rows = quantised_rows(here) if operand is None else decoded(operand).in_slots(1)
        y = quantised_experts(here, claims, rows)[2]
        for pair, value, variance in zip(pairs, y.value, y.variance, strict=True):
            back = shards[pair.source][world.grid.tp_rank(rank)]
            back.value[pair.token, pair.slot], back.variance[pair.token, pair.slot] = value[0], variance[0]
    outs = []
    for home, parts in zip(homes, shards, strict=True):
        terms = [home, *(_without_replicated(home) for _ in parts[1:])]
        sums = [finish(term, part, claims) for term, part in zip(terms, parts, strict=True)]
        outs.append(_summed(sums, world.problem.fmt, claims))
    return outs


def _nothing(home: Inputs) -> Spread:
    """y (T, K, H) before anything came back."""
    zeros = torch.zeros(*home.topk_ids.shape, home.problem.hidden, dtype=torch.float64, device=home.device)
    return Spread(zeros, zeros.clone())


def _summed(parts: Sequence[Spread], fmt: Format, claims: Claims) -> Value:
    """out of what each shard of I makes of it."""
    exact = torch.stack([part.value for part in parts]).sum(dim=0)
    allowed = torch.stack([part.allowed for part in parts]).sum(dim=0)
    if len(parts) > 1:
        magnitude = torch.stack([part.value.abs() for part in parts]).sum(dim=0)
        quantum = min(lowest_bit(part.value) for part in parts)
        allowed = allowed + combine_error(magnitude, len(parts), quantum, fmt, claims)
    return stored(exact, allowed, fmt)


def _shards(world: World, whole: Inputs) -> list[Inputs]:
    """All tokens and all experts on each shard of I; the terms that are not sharded on the first alone."""
    p = whole.problem
    if world.tp == 1:
        return [whole]
    group = World(p, (p.T,) * world.tp, world.tp)
    shards = [rank_inputs(group, whole, shard) for shard in range(world.tp)]
    return [shards[0], *map(_without_replicated, shards[1:])]


def _without_replicated(inputs: Inputs) -> Inputs:
    """The same call without the shared and the identity experts."""
    p = inputs.problem
    return replace(inputs, problem=replace(p, shared=0, shared_gate=False, router=replace(p.router, zero_experts=0)))


def home_inputs(inputs: Inputs) -> Inputs:
    """A rank's tokens as COMBINE sees them: physical ids, every expert present, no map."""
    problem = replace(inputs.problem, ep=1, ep_rank=0, layout="standard", capacity=0)
    return replace(inputs, expert_map=None, problem=problem)


def combine_shards(home: Inputs, y_shards: Sequence[Tensor], fmt: Format, claims: Claims) -> Value:
    """COMBINE isolated: out (T, H) of the rows y (T, K, H) that came back, one tensor for each shard of I."""
    p = home.problem
    sums = [routed_sum(home, y) for y in y_shards]
    exact = torch.stack([s[0] for s in sums]).sum(dim=0) * p.scale_on_sum
    magnitude = torch.stack([s[1] for s in sums]).sum(dim=0) * abs(p.scale_on_sum)
    finest = torch.stack([torch.as_tensor(s[2], dtype=torch.float64, device=home.device) for s in sums]).amin(dim=0)
    quantum = finest if p.scale_on_sum == 1.0 else 0.0
    error = combine_error(magnitude, p.slots * len(sums) + 1, quantum, fmt, claims)
    shared = shared_expert(home, claims)
    if shared is not None:
        value, allowed = shared
        exact, error = exact + value, error + allowed + 2 * U32 * (value.abs() + exact.abs())
    return stored(exact, error, fmt)
