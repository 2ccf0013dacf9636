"""This folder's prepare/finalize implementations for several ranks, as candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from moeproof.reference.contract.candidate import Claims, RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize
from moeproof.reference.contract.overlap import FusedMoEOverlappedKernel
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.world import World
from moeproof.reference.eager.experts_of import batched_experts, standard_experts, taps
from moeproof.reference.eager.ranks_all_gather import AllGatherReduceScatter
from moeproof.reference.eager.ranks_all_to_all import AllToAll
from moeproof.reference.eager.ranks_batched import BatchedAllToAll

Supports = Callable[[Problem], str | None]
Build = Callable[[Inputs, World, Link], FusedMoEPrepareAndFinalize]


def _all_gather(quant1: str) -> Build:
    return lambda inputs, world, link: AllGatherReduceScatter(link, world.grid, scheme=world.problem.quant, quant1=quant1)


def _all_to_all(quant1: str) -> Build:
    return lambda inputs, world, link: AllToAll(link, world.grid, world.max_tokens, scheme=world.problem.quant, quant1=quant1)


def _batched(quant1: str) -> Build:
    def build(inputs: Inputs, world: World, link: Link) -> BatchedAllToAll:
        # Without sp every rank of a tensor-parallel group sends the tokens that they all hold.
        rows = world.problem.rows_per_expert * (1 if world.distinct else world.tp)
        return BatchedAllToAll(link, world.grid, rows, world.max_tokens, scheme=world.problem.quant, quant1=quant1)

    return build


def rank_pairs(standard: Supports, batched: Supports, claims: Claims, quant1: str = "source", mark: str = "") -> list[RankPair]:
    """`standard` and `batched` say which problems the experts of that layout can compute, on however many ranks.

    `quant1` is where QUANT1 stands, a word of contract.candidate.QUANT1; `mark` ends the names.
    """

    def rows(world: World) -> str | None:
        return standard(world.problem)

    def halves(world: World) -> str | None:
        for name, q in (("x", world.problem.quant.a1), ("h", world.problem.quant.a2)):
            if q is not None and not q.by_token and not q.static:
                return f"scheme {world.problem.scheme}: each micro-batch would have a scale of {name} of its own"
        return standard(world.problem)

    def in_regions(world: World) -> str | None:
        return batched(world.problem)

    gather, exchange, regions = _all_gather(quant1), _all_to_all(quant1), _batched(quant1)
    plain = RankPair(f"eager-allgather{mark}", gather, standard_experts, supports=rows, claims=claims, quant1=quant1, taps=taps)
    return [
        plain,
        replace(plain, name=f"eager-alltoall{mark}", prepare_finalize=exchange),
        replace(
            plain,
            name=f"eager-alltoall-overlapped{mark}",
            prepare_finalize=exchange,
            supports=halves,
            kernel=FusedMoEOverlappedKernel,
        ),
        replace(
            plain,
            name=f"eager-batched-alltoall{mark}",
            prepare_finalize=regions,
            experts=batched_experts,
            layout="batched",
            supports=in_regions,
        ),
    ]
