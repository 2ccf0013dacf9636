"""COMBINE on simulated ranks: what every rank's own tokens end with. It does not depend on where the experts were."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import Format
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.bounds import U32, combine_error
from moeproof.reference.oracle.chain import shared_expert, spreads
from moeproof.reference.oracle.combine import routed_sum
from moeproof.reference.oracle.rounding import lowest_bit
from moeproof.reference.oracle.value import Value, stored
from moeproof.reference.ranks.split import rank_inputs

Tensor = torch.Tensor


def rank_outputs(world: World, whole: Inputs, claims: Claims) -> list[Value]:
    """out (T, H) of every rank's tokens, with the bound propagated from the inputs.

    One rank alone computes the same sum: experts elsewhere, replicas and order change nothing but rounding, which the bound
    covers. Tensor-parallel shards are summed: each brings its own rounding of y. Shared and identity experts are replicated,
    and enter once.
    """
    parts = [spreads(shard, claims)["out"] for shard in _shards(world, whole)]
    exact = torch.stack([part.value for part in parts]).sum(dim=0)
    allowed = torch.stack([part.allowed for part in parts]).sum(dim=0)
    if len(parts) > 1:
        magnitude = torch.stack([part.value.abs() for part in parts]).sum(dim=0)
        quantum = min(lowest_bit(part.value) for part in parts)
        allowed = allowed + combine_error(magnitude, len(parts), quantum, whole.problem.fmt, claims)
    every = stored(exact, allowed, whole.problem.fmt)
    assert every.bound is not None
    return [Value(every.value[rows], every.bound[rows], None, every.fmt) for rows in map(world.rows, range(world.ranks))]


def _shards(world: World, whole: Inputs) -> list[Inputs]:
    """All tokens and all experts on each shard of I; the terms that are not sharded on the first alone."""
    p = whole.problem
    if world.tp == 1:
        return [whole]
    group = World(p, (p.T,) * world.tp, world.tp)
    shards = [rank_inputs(group, whole, shard) for shard in range(world.tp)]
    once = {"shared": 0, "shared_gate": False, "router": replace(p.router, zero_experts=0)}
    return [shards[0]] + [replace(s, problem=replace(s.problem, **once)) for s in shards[1:]]  # type: ignore[arg-type]


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
    quantum = min(s[2] for s in sums) if p.scale_on_sum == 1.0 else 0.0
    error = combine_error(magnitude, p.slots * len(sums) + 1, quantum, fmt, claims)
    shared = shared_expert(home, claims)
    if shared is not None:
        value, allowed = shared
        exact, error = exact + value, error + allowed + 2 * U32 * (value.abs() + exact.abs())
    return stored(exact, error, fmt)
