"""The prepare/finalize of a candidate for several ranks with the experts of a single-rank pair of the same layout."""

from __future__ import annotations

from dataclasses import replace

from moeproof.reference.contract.candidate import Claims, Pair, RankPair
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.world import World

JOIN = "+"
"""Between the two names: `eager-alltoall+triton-fp8-modular`."""


def cannot_cross(ranks: RankPair, alone: Pair) -> str | None:
    """Why they cannot work together, or None."""
    if ranks.layout != alone.layout:
        return f"{ranks.name} works on the {ranks.layout} layout and {alone.name} on the {alone.layout} one; they must be equal"
    if "torch" in (ranks.backend, alone.backend) or ranks.backend == alone.backend:
        return None
    return f"{ranks.name} needs backend {ranks.backend} and {alone.name} {alone.backend}; one process has one of them"


def crossed(ranks: RankPair, alone: Pair) -> RankPair:
    """`ranks` with the experts of `alone`. Raises ContractError where they do not share a layout, or a backend."""
    reason = cannot_cross(ranks, alone)
    check(reason is None, str(reason))

    def supports(world: World) -> str | None:
        return ranks.supports(world) or alone.supports(world.rank_problem(0))

    return replace(
        ranks,
        name=f"{ranks.name}{JOIN}{alone.name}",
        experts=alone.experts,
        supports=supports,
        claims=_weaker(ranks.claims, alone.claims),
        backend=alone.backend if ranks.backend == "torch" else ranks.backend,
        taps=alone.taps,
        source="",
    )


def _weaker(ranks: Claims, alone: Claims) -> Claims:
    """What each claims of its own part; the weaker word of both where it is about the whole."""
    order = ("batch", "run", "none")
    deterministic = max(ranks.deterministic, alone.deterministic, key=order.index)
    return replace(alone, combine=ranks.combine, deterministic=deterministic)
