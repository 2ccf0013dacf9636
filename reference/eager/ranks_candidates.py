"""This folder's prepare/finalize implementations for several ranks, as candidates."""

from __future__ import annotations

from collections.abc import Callable

from moeproof.reference.contract.candidate import Claims, RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute
from moeproof.reference.contract.overlap import FusedMoEOverlappedKernel
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.world import World
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts
from moeproof.reference.eager.ranks_all_gather import AllGatherReduceScatter
from moeproof.reference.eager.ranks_all_to_all import AllToAll
from moeproof.reference.eager.ranks_batched import BatchedAllToAll


def _all_gather(inputs: Inputs, world: World, link: Link) -> AllGatherReduceScatter:
    return AllGatherReduceScatter(link, world.grid)


def _all_to_all(inputs: Inputs, world: World, link: Link) -> AllToAll:
    return AllToAll(link, world.grid, world.max_tokens)


def _batched(inputs: Inputs, world: World, link: Link) -> BatchedAllToAll:
    return BatchedAllToAll(link, world.grid, world.problem.rows_per_expert, world.max_tokens)


def _loop(inputs: Inputs) -> FusedMoEPermuteExpertsUnpermute:
    return LoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


def _batched_loop(inputs: Inputs) -> FusedMoEPermuteExpertsUnpermute:
    return BatchedLoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


Supports = Callable[[Problem], str | None]


def rank_pairs(standard: Supports, batched: Supports, claims: Claims) -> list[RankPair]:
    """`standard` and `batched` say which problems the experts of that layout can compute, on however many ranks."""

    def rows(world: World) -> str | None:
        if world.problem.quant.quantised:
            return f"scheme {world.problem.scheme}: ranks share unquantised problems only"
        return standard(world.problem)

    def whole_rows(world: World) -> str | None:
        if world.problem.quant.quantised:
            return f"scheme {world.problem.scheme}: ranks share unquantised problems only"
        if world.tp > 1:
            return f"tp={world.tp}: the batched exchange returns whole rows, it cannot sum shards"
        return batched(world.problem)

    return [
        RankPair("eager-allgather", _all_gather, _loop, supports=rows, claims=claims),
        RankPair("eager-alltoall", _all_to_all, _loop, supports=rows, claims=claims),
        RankPair(
            "eager-alltoall-overlapped",
            _all_to_all,
            _loop,
            supports=rows,
            claims=claims,
            kernel=FusedMoEOverlappedKernel,
        ),
        RankPair("eager-batched-alltoall", _batched, _batched_loop, "batched", whole_rows, claims),
    ]
