"""Every class that was caught, shrunk: one planting of each, to the fewest tokens that still show the same blame."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.faults.chance import REPEATS
from moeproof.harness.faults.fault import CHANCES, Dice, Fault
from moeproof.harness.faults.grounds import STATEFUL, anew, judged, planted
from moeproof.harness.faults.hang import judge_hang
from moeproof.harness.faults.hunt import Hunt, Watch
from moeproof.harness.judging.sequences import judge_repeats
from moeproof.harness.shrinking.reductions import smaller
from moeproof.harness.shrinking.shrink import Attempt, blame, search
from moeproof.harness.verdict import Verdict
from moeproof.reference.contract.errors import ContractError

SECONDS = 60.0
"""Limit for one class."""


@dataclass(frozen=True)
class Small:
    """The smallest case found for a class; `error` where the failure would not come again."""

    id: str
    variant: str
    scheme: str
    start: str
    case: str = ""
    tokens: int = -1
    runs: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    complete: bool = False
    blame: str = ""
    error: str = ""


def shrunk(fault: Fault, found: Hunt) -> Small:
    """Shrink the case that caught this planting."""
    start = parse_case(found.at)
    small = Small(fault.id, found.variant, found.scheme, found.at)
    watch = Watch()
    simpler = {"simpler_ones": _fewer_tokens} if fault.ground == "ranks" else {}
    try:
        end = search(fault.id, _attempt(fault, found), start, max_seconds=SECONDS, **simpler)  # type: ignore[arg-type]
    except ContractError as error:
        return replace(small, error=str(error))
    return replace(
        small,
        case=str(end.case),
        tokens=end.tokens,
        runs=end.runs,
        seconds=watch.wall,
        cpu_seconds=watch.cpu,
        complete=end.complete,
        blame=blame(end.verdict),
    )


def _attempt(fault: Fault, found: Hunt) -> Attempt:
    """How the class is judged while its case shrinks; nothing is remembered from one attempt to the next."""

    def by_call(case: Case, lean: bool) -> Verdict:
        thing = anew(fault, found.variant, found.number, found.scheme)
        return judged(fault, planted(fault, found.variant, found.number, found.scheme)[0], thing, case, lean)

    def by_history(case: Case, lean: bool) -> Verdict:
        pipeline, thing, _ = planted(fault, found.variant, found.number)
        # The finding may be about a neighbour of the case; what shrinks is the case that starts the history.
        return replace(judged(fault, pipeline, thing, case), case=case)

    def by_repeats(case: Case, lean: bool) -> Verdict:
        _, thing, _ = planted(fault, found.variant, found.number, dice=Dice(CHANCES[0]))
        return judge_repeats(thing, case, REPEATS, "cpu")[0]

    def by_watchdog(case: Case, lean: bool) -> Verdict:
        return judge_hang(fault, found.variant, case, found.number)

    if fault.ground == "ranks":
        return by_watchdog
    return by_repeats if fault.random else by_history if fault.ground in STATEFUL else by_call


def _fewer_tokens(case: Case) -> Iterator[tuple[str, Case]]:
    """Ranks that only meet in collectives have no other sizes."""
    for T in smaller(case.problem.T):
        yield "T", case.with_problem(T=T)
