"""Everything a rank must end with, in one noun: what it receives, how much, and its output."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.quantise import Quantised
from moeproof.reference.oracle.value import Value
from moeproof.reference.ranks.combine import quantised_outputs, rank_outputs
from moeproof.reference.ranks.dispatch import Pair, pair_counts, received
from moeproof.reference.ranks.quant1 import arriving
from moeproof.reference.ranks.split import rank_inputs

Tensor = torch.Tensor


@dataclass(frozen=True)
class RankExpectation:
    """One rank of a world."""

    inputs: Inputs
    """What it is given."""
    pairs: tuple[Pair, ...]
    """(source, token, slot) pairs that must arrive, each exactly once, and nothing else that is computed."""
    counts: Tensor
    """int32 (e,)."""
    out: Value
    """(T, H), chained from the inputs."""
    operand: Quantised | None = None
    """(pairs, H): the codes and scales that the pairs must arrive with; None where x is not quantised."""


def rank_expectations(world: World, whole: Inputs, claims: Claims, quant1: str = "source") -> list[RankExpectation]:
    """Every rank's view of the world, from the tensors of the single-rank problem. Raises ContractError as World does.

    `quant1` is where the candidate quantises x, a word of contract.candidate.QUANT1.
    """
    ranks = [rank_inputs(world, whole, rank) for rank in range(world.ranks)]
    at = received(world, ranks)
    operands = arriving(world, ranks, at, quant1)
    if world.problem.quant.quantised:
        outs = quantised_outputs(world, ranks, at, operands, claims)
    else:
        outs = rank_outputs(world, whole, claims)
    return [
        RankExpectation(inputs, tuple(pairs), pair_counts(world, pairs, rank), out, operand)
        for rank, (inputs, pairs, out, operand) in enumerate(zip(ranks, at, outs, operands, strict=True))
    ]
