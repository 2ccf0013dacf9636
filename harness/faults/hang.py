"""Faults that hang: ranks in a child under a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.harness.faults import ranks
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.hunt import Hunt, Watch
from moeproof.harness.faults.world import SPLITS, World
from moeproof.harness.verdict import Finding, Outcome, Verdict

CAMP = {"P78": lambda tokens: tokens == 0, "P79": lambda tokens: tokens > ranks.CHUNK, "P80": ranks.rounds_of}
"""What a rank's own count makes it decide. A watchdog sees two camps and cannot know which of them is right."""


def sizes_of(case: Case, number: int) -> list[int]:
    """Tokens of each rank; splits in turn, case by case."""
    return World(list(SPLITS)[number % len(SPLITS)]).sizes(case.problem.T)


def hunt_hang(fault: Fault, variant: str, cases: Sequence[Case]) -> Hunt:
    """All cases in one child; a healthy child comes to its end."""
    watch = Watch()
    worlds = [sizes_of(case, number) for number, case in enumerate(cases)]
    fired, stuck = ranks.watch(fault.id, variant, True, worlds)
    _, twin = ranks.watch(fault.id, variant, False, worlds)
    result = Hunt(
        fault.id,
        variant,
        triggered=fired > 0,
        twin_checks=len(worlds),
        twin_alarms=() if twin is None else (str(twin.finding),),
        seconds=watch.wall,
        cpu_seconds=watch.cpu,
    )
    if stuck is None:
        return result
    return replace(
        result,
        caught=True,
        right_stage=stuck.finding.stage in fault.blame,
        place=_right_rank(fault, stuck.finding, worlds[stuck.index]),
        needed=stuck.index + 1,
        number=stuck.index,
        at=str(cases[stuck.index]),
        case=str(cases[stuck.index]),
        finding=str(stuck.finding),
        outcome=str(Outcome.TIMEOUT),
    )


def judge_hang(fault: Fault, variant: str, case: Case, number: int) -> Verdict:
    """One case in a child of its own."""
    _, stuck = ranks.watch(fault.id, variant, True, [sizes_of(case, number)])
    if stuck is None:
        return Verdict(Outcome.PASS, fault.id, case, checked=1)
    return Verdict(Outcome.TIMEOUT, fault.id, case, (stuck.finding,), reason="ranks wait for each other")


def _right_rank(fault: Fault, finding: Finding, sizes: Sequence[int]) -> bool:
    """The rank that the finding names is in another camp than some rank that waits."""
    camps = [CAMP[fault.id](tokens) for tokens in sizes]
    return finding.rank is not None and any(camp != camps[finding.rank] for camp in camps)
