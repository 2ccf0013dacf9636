"""The calls by which a case on several ranks is judged: the same list on every rank, which makes them, and in the judge.

Each instance's buffers hold one pattern where nothing was written; some calls come again, some after others, some on the
tokens of a metamorphic relation. Ranks agree on the list because it follows from the case alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.inputs import make_inputs, strided
from moeproof.harness.cases.tokens import PER_TOKEN
from moeproof.harness.cases.worlds import make_rank_inputs, whole_case
from moeproof.harness.judging.graphs import REPLAYS, ROUTINGS
from moeproof.harness.judging.history import others
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.judging.relations import RELATIONS
from moeproof.harness.ranks.checks import permuted
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.world import World, rank_seed
from moeproof.reference.ranks.split import rank_inputs

BACK_TO_BACK = ("uniform", "none", "hot_first")
"""Routings of the calls that follow each other on one instance while a rank is late."""


@dataclass(frozen=True)
class Turn:
    """One forward call of all ranks together."""

    case: Case
    """Whose tensors are given."""
    world: World
    instance: int = 0
    """Calls of one number are made on one instance of the pair, which is built for the first of them."""
    pattern: str = PATTERNS[0]
    """What unwritten memory holds meanwhile."""
    why: str = ""
    """What a finding of this call must say about it: `called again`, .. ; empty for the first call."""
    late: int | None = None
    """A rank that comes late to each of its parts."""
    layer: Case | None = None
    """Whose weights, biases and static scales: one instance serves one layer, so only its tokens may change."""
    changed: tuple[str, int] | None = None
    """(relation, which of its calls): the tensors are those that the relation makes of the case's."""

    def repeats(self, first: Turn) -> bool:
        """It must have the very bits of the first call."""
        return (self.case, self.world, self.changed, self.layer) == (first.case, first.world, first.changed, first.layer)


def turns(case: Case, lean: bool = False) -> tuple[Turn, ...]:
    """All calls of a case, its own first. A lean judge makes that one only."""
    first = Turn(case, case.world)
    if lean:
        return (first,)
    plan = [first]
    plan += [
        replace(first, instance=n, pattern=pattern, why=f"where unwritten memory holds '{pattern}'")
        for n, pattern in enumerate(PATTERNS)
        if n
    ]
    plan.append(replace(first, why="called again"))
    if case.history == "interleave":
        plan += _interleaved(first, len(PATTERNS))
    if case.relation != "none":
        plan += _related(case, 2 * len(PATTERNS) + 2)
    return tuple(plan)


def _interleaved(first: Turn, instance: int) -> Iterator[Turn]:
    """Other data and routing on one instance, with a late rank; other problems on new ones; then the first one's call again."""
    quiet = replace(first.case, history="none", relation="none")
    late = rank_seed(first.case.seed, 0) % first.world.ranks
    for number, routing in enumerate(BACK_TO_BACK, start=1):
        if quiet.problem.routed_ids >= quiet.problem.K and quiet.routing != "router":
            quiet = replace(quiet, routing=routing)
        other = replace(quiet, seed=first.case.seed + number)
        yield Turn(other, first.world, instance, PATTERNS[1], f"of other data, back to back ({other})", late, first.case)
    yield replace(first, instance=instance, why=f"after calls with other data, while rank {late} is late", late=late)
    for number, other in enumerate(others(first.case), start=1):
        yield Turn(other, other.world, instance + number, PATTERNS[1], f"in between ({other})")
    yield replace(first, why="once other cases have run in between")


def replays(case: Case) -> tuple[Turn, ...]:
    """What history=graph replays on one captured call: the case, then other data and routing, for the same tokens a rank."""
    first = Turn(case, case.world, why="of a captured call, replayed")
    plan = [first]
    for number in range(1, REPLAYS):
        other = replace(case, seed=case.seed + number, history="none", relation="none")
        if case.problem.routed_ids >= case.problem.K and case.routing != "router":
            other = replace(other, routing=ROUTINGS[number % len(ROUTINGS)])
        plan.append(replace(first, case=other, layer=case, why=f"replay {number} of a captured call ({other})"))
    return tuple(plan)


def _related(case: Case, instance: int) -> Iterator[Turn]:
    for part, (world, _) in enumerate(related_calls(case, torch.device("cpu"))):
        yield Turn(case, world, instance + part, why=f"of relation {case.relation}", changed=(case.relation, part))


def related_calls(case: Case, device: torch.device) -> list[tuple[World, Inputs]]:
    """(world, the whole layer's tensors) of each call that the case's relation makes."""
    whole = make_inputs(replace(whole_case(case), strided=False), device)
    if case.relation == "ranks":
        return [permuted(case.world, whole, rank_order(case))]
    calls = []
    for changed in RELATIONS[case.relation].changed(whole, relation_stream(case, device)):
        T = changed.problem.T
        calls.append((case.world if T == case.problem.T else case.with_problem(T=T).world, changed))
    return calls


def relation_stream(case: Case, device: torch.device) -> Stream:
    """The same draws wherever a relation's inputs and what follows from them are made."""
    return Stream(case.seed, f"relation/{case.relation}", device)


def rank_order(case: Case) -> list[int]:
    """Whose tokens each rank gets under relation=ranks; never the ranks as they are."""
    shift = 1 + rank_seed(case.seed, 0) % (case.ranks - 1)
    return [(rank + shift) % case.ranks for rank in range(case.ranks)]


def turn_inputs(turn: Turn, rank: int, device: torch.device) -> Inputs:
    """What one rank is given in this call."""
    if turn.changed is None and turn.layer is None and turn.world == turn.case.world:
        return make_rank_inputs(turn.case, rank, device)
    inputs = rank_inputs(turn.world, turn_whole(turn, device), rank)
    return strided(inputs) if turn.case.strided else inputs


def turn_whole(turn: Turn, device: torch.device | str = "cpu") -> Inputs:
    """The whole layer's tensors of this call."""
    device = torch.device(device)
    if turn.changed is not None:
        return related_calls(turn.case, device)[turn.changed[1]][1]
    own = make_inputs(replace(whole_case(turn.case), strided=False), device)
    if turn.layer is None:
        return own
    layer = make_inputs(replace(whole_case(turn.layer), strided=False), device)
    return layer.map({name: t for name, t in own.tensors() if name in PER_TOKEN})
