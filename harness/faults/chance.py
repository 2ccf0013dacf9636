"""Faults that fire by chance: scored by the calls it takes until they are caught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.harness.faults.fault import Dice, Fault
from moeproof.harness.faults.grounds import QUIET, planted, vacuous
from moeproof.harness.faults.hunt import TWINS, Hunt, Watch, caught_by, fires, twin_of
from moeproof.harness.judging.sequences import judge_repeats

REPEATS = 20
"""Calls of one case before the next is taken."""
MOST_CALLS = 4000
"""Where a fault is given up."""
SEEDS = (1, 2, 3, 4, 5)
"""Of the dice: one run of luck says little, so the median is reported."""


def hunt_by_chance(fault: Fault, variant: str, chance: float, cases: Sequence[Case], seed: int = 1) -> Hunt:
    """Repeats of one case after the other, round and round, until bits change or MOST_CALLS are spent.

    Only cases in which it can change what is shown are repeated, small ones first.
    """
    watch = Watch()
    numbered = [(n, c) for n, c in enumerate(cases) if fires(fault, variant, n, c)]
    numbered.sort(key=lambda item: item[1].problem.weight_experts * item[1].problem.T)
    calls, fired, rounds = 0, 0, 0
    result = Hunt(fault.id, variant, chance=chance)
    dice = Dice(chance, seed)
    while numbered and calls < MOST_CALLS and not result.caught:
        number, case = numbered[rounds % len(numbered)]
        rounds += 1
        _, thing, witness = planted(fault, variant, number, dice=dice)
        verdict, made = judge_repeats(thing, case, REPEATS, "cpu")
        calls, fired = calls + made, fired + witness.fired
        if verdict.outcome not in QUIET and not vacuous(case):
            result = replace(caught_by(result, fault, variant, verdict, number), needed=calls, at=str(case))
    twins = [twin_of(fault, variant, "", number, case) for number, case in numbered[:TWINS]]
    alarms = tuple(str(v) for v in twins if v.outcome not in QUIET)
    return replace(
        result, triggered=fired > 0, twin_checks=len(twins), twin_alarms=alarms, seconds=watch.wall, cpu_seconds=watch.cpu
    )


def median(fault: Fault, variant: str, chance: float, cases: Sequence[Case]) -> Hunt:
    """Of the runs with SEEDS the middle one by calls needed; what was not caught counts as longest."""
    runs = [hunt_by_chance(fault, variant, chance, cases, seed) for seed in SEEDS]
    middle = sorted(runs, key=lambda h: (not h.caught, h.needed))[len(runs) // 2]
    return replace(middle, seconds=sum(run.seconds for run in runs), cpu_seconds=sum(run.cpu_seconds for run in runs))
