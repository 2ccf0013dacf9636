"""Hunts planted faults through a list of cases: did it fire, was it caught, on which stage, where, after how many cases."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults import ranks
from moeproof.harness.faults.fault import CHANCES, Dice, Fault, plant
from moeproof.harness.faults.pipeline import Pipeline, candidate
from moeproof.harness.faults.place import right_place
from moeproof.harness.faults.replayed import Replayed
from moeproof.harness.faults.world import SPLITS, TensorParallel, World, world_candidate
from moeproof.harness.judging.checks import CHECKS, vacuity
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.memory import PATTERNS, Poison, guard_inputs
from moeproof.harness.judging.sequences import judge_repeats, judge_replay, judge_sequence
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.inputs import Inputs

REPEATS = 20
"""Calls of one case before the next is taken, for faults that fire by chance."""
MOST_CALLS = 2000
"""Where a fault that fires by chance is given up."""
SEEDS = (1, 2, 3, 4, 5)
"""Of the dice: one run of luck says little, so the median is reported."""
QUIET = (Outcome.PASS, Outcome.UNSUPPORTED, Outcome.VACUOUS)
SHARP = tuple(check for check in CHECKS if check is not vacuity)
"""The gate is left out: all it can do is make a VACUOUS of a PASS, and neither catches anything."""


@dataclass(frozen=True)
class Hunt:
    """What became of one variant of a class."""

    id: str
    variant: str
    chance: float = 1.0
    triggered: bool = False
    caught: bool = False
    right_stage: bool = False
    place: bool | None = None
    """Is the place right? None where the fault changes every row, or the finding can have no coordinates."""
    needed: int = 0
    """Cases of the list up to the one that caught it; for faults by chance the calls."""
    at: str = ""
    """The case of the list that caught it."""
    number: int = 0
    """Its place in the list, counted from 0: worlds take their split from it."""
    case: str = ""
    """The case that the finding is about: `at`, or a neighbour of it in a sequence or a replay."""
    finding: str = ""
    twin_checks: int = 0
    twin_alarms: tuple[str, ...] = ()
    seconds: float = 0.0


@functools.lru_cache(maxsize=512)
def _inputs(case: Case) -> Inputs:
    return make_inputs(case, "cpu")


def ground_of(fault: Fault, number: int) -> tuple[Pipeline, Candidate]:
    """A healthy pipeline of the fault's ground and its candidate. Worlds take their split in turn, case by case."""
    if fault.ground == "world":
        world = World(list(SPLITS)[number % len(SPLITS)])
        return world, world_candidate(world, fault.id)
    pipeline = {"tensor": TensorParallel, "replay": Replayed}.get(fault.ground, Pipeline)()
    return pipeline, candidate(pipeline, fault.id)


def judged(fault: Fault, pipeline: Pipeline, thing: Candidate, case: Case) -> Verdict:
    """One case, in the way of the fault's ground."""
    if fault.ground == "sequence":
        return judge_sequence(thing, case, "cpu")
    if isinstance(pipeline, Replayed):
        return judge_replay(fault.id, pipeline.capture, case, thing, "cpu")
    return judge(thing, case, "cpu", checks=SHARP)


def _fires(fault: Fault, variant: str, number: int, case: Case) -> bool:
    """Would one plain call fire it, were chance on its side? Spares the judgement of cases that cannot."""
    pipeline, _ = ground_of(fault, number)
    witness = plant(pipeline, fault.variants[variant], dice=Dice(1.0))
    given, _ = guard_inputs(_inputs(case), "nan")
    try:
        with Poison("nan"):
            pipeline(given)
    except Exception:  # what the fault threw shows in the judgement
        return True
    return witness.fired > 0


def _supported(fault: Fault, number: int, case: Case) -> bool:
    return ground_of(fault, number)[1].supports(case.problem) is None


def hunt(fault: Fault, variant: str, cases: Sequence[Case], twin_cases: int = 3) -> Hunt:
    """Case after case until it is caught; then its twin over the same cases, and at least `twin_cases` of them."""
    if fault.ground == "ranks":
        return _hunt_hang(fault, variant, cases)
    start = time.perf_counter()
    triggered, tried = False, []
    result = Hunt(fault.id, variant)
    for number, case in enumerate(cases):
        pipeline, thing = ground_of(fault, number)
        if thing.supports(case.problem) is not None:
            continue
        stateful = fault.ground in ("sequence", "replay")
        if not stateful and not _fires(fault, variant, number, case):
            continue
        witness = plant(pipeline, fault.variants[variant])
        verdict = judged(fault, pipeline, thing, case)
        triggered |= witness.fired > 0
        tried.append((number, case))
        if witness.fired and verdict.outcome not in QUIET:
            result = replace(_caught(result, fault, variant, verdict, number), at=str(case))
            break
    twins = tried[-twin_cases:] or list(enumerate(cases))[:twin_cases]
    alarms = tuple(_twin_alarms(fault, variant, twins))
    return replace(result, triggered=triggered, twin_checks=len(twins), twin_alarms=alarms, seconds=time.perf_counter() - start)


def _caught(result: Hunt, fault: Fault, variant: str, verdict: Verdict, number: int) -> Hunt:
    first = verdict.findings[0] if verdict.findings else None
    return replace(
        result,
        caught=True,
        right_stage=(first.stage if first else None) in fault.blame,
        place=_place(fault, variant, verdict, number),
        needed=number + 1,
        number=number,
        case=str(verdict.case),
        finding=str(first) if first else verdict.reason,
    )


def _place(fault: Fault, variant: str, verdict: Verdict, number: int) -> bool | None:
    """Healthy and faulty side by side on the same inputs: did the fault change what the finding names?

    Under each poison pattern, since a fault that reads unwritten memory changes other places with each; one must agree.
    """
    if not verdict.findings or fault.random or fault.ground in ("sequence", "replay"):
        return None
    seen = [_place_under(pattern, fault, variant, verdict, number) for pattern in PATTERNS]
    known = [place for place in seen if place is not None]
    return any(known) if known else None


def _place_under(pattern: str, fault: Fault, variant: str, verdict: Verdict, number: int) -> bool | None:
    shown = []
    for armed in (False, True):
        pipeline, _ = ground_of(fault, number)
        plant(pipeline, fault.variants[variant], armed)
        try:
            given, _ = guard_inputs(make_inputs(verdict.case, "cpu"), pattern)
            with Poison(pattern):
                shown.append(pipeline(given))
        except Exception:  # a fault that throws shows no tensors to compare
            return None
    return right_place(verdict.findings[0], shown[0], shown[1], make_inputs(verdict.case, "cpu"))


def _twin_alarms(fault: Fault, variant: str, cases: Sequence[tuple[int, Case]]) -> Iterator[str]:
    for number, case in cases:
        pipeline, thing = ground_of(fault, number)
        plant(pipeline, fault.variants[variant], armed=False)
        verdict = judged(fault, pipeline, thing, case)
        if verdict.outcome not in QUIET:
            yield str(verdict)


def hunt_by_chance(fault: Fault, variant: str, chance: float, cases: Sequence[Case], seed: int = 1) -> Hunt:
    """Repeats of one case after the other, round and round, until bits change or MOST_CALLS are spent.

    Only cases in which it can fire at all are repeated.
    """
    start = time.perf_counter()
    numbered = [(n, c) for n, c in enumerate(cases) if _supported(fault, n, c) and _fires(fault, variant, n, c)]
    calls, fired, rounds = 0, 0, 0
    result = Hunt(fault.id, variant, chance)
    dice = Dice(chance, seed)
    while numbered and calls < MOST_CALLS and not result.caught:
        number, case = numbered[rounds % len(numbered)]
        rounds += 1
        pipeline, thing = ground_of(fault, number)
        witness = plant(pipeline, fault.variants[variant], dice=dice)
        verdict, made = judge_repeats(thing, case, REPEATS, "cpu")
        calls, fired = calls + made, fired + witness.fired
        if verdict.outcome not in QUIET:
            result = replace(_caught(result, fault, variant, verdict, number), needed=calls, at=str(case))
    twins = numbered[:3]
    alarms = tuple(_twin_alarms(fault, variant, twins))
    return replace(result, triggered=fired > 0, twin_checks=len(twins), twin_alarms=alarms, seconds=time.perf_counter() - start)


def _hunt_hang(fault: Fault, variant: str, cases: Sequence[Case]) -> Hunt:
    """All cases in one child; a healthy child comes to its end."""
    start = time.perf_counter()
    worlds = [World(list(SPLITS)[i % len(SPLITS)]).sizes(case.problem.T) for i, case in enumerate(cases)]
    fired, stuck = ranks.watch(fault.id, variant, True, worlds)
    _, twin = ranks.watch(fault.id, variant, False, worlds)
    result = Hunt(
        fault.id,
        variant,
        triggered=fired > 0,
        twin_checks=len(worlds),
        twin_alarms=() if twin is None else (str(twin.finding),),
        seconds=time.perf_counter() - start,
    )
    if stuck is None:
        return result
    place = _right_rank(fault, stuck.finding, worlds[stuck.index])
    stage = stuck.finding.stage in fault.blame
    return replace(
        result,
        caught=True,
        right_stage=stage,
        place=place,
        needed=stuck.index + 1,
        number=stuck.index,
        at=str(cases[stuck.index]),
        case=str(cases[stuck.index]),
        finding=str(stuck.finding),
    )


CAMP = {"P78": lambda tokens: tokens == 0, "P79": lambda tokens: tokens > ranks.CHUNK, "P80": ranks.rounds_of}
"""What a rank's own count makes it decide. A watchdog sees two camps and cannot know which of them is right."""


def _right_rank(fault: Fault, finding: Finding, sizes: Sequence[int]) -> bool:
    """The rank that the finding names is in another camp than some rank that waits."""
    camps = [CAMP[fault.id](tokens) for tokens in sizes]
    return finding.rank is not None and any(camp != camps[finding.rank] for camp in camps)


def _median(hunts: Sequence[Hunt]) -> Hunt:
    """The middle one by calls needed; what was not caught counts as longest."""
    return sorted(hunts, key=lambda h: (not h.caught, h.needed))[len(hunts) // 2]


def hunts_of(fault: Fault, cases: Sequence[Case]) -> list[Hunt]:
    """Every variant of a class, at every chance where it fires by chance."""
    if fault.random:
        return [_median([hunt_by_chance(fault, v, p, cases, s) for s in SEEDS]) for v in fault.variants for p in CHANCES]
    return [hunt(fault, v, cases) for v in fault.variants]
