"""Shrinking: the simplest case that a candidate fails in the same way.

Greedy and deterministic: reductions are tried in a fixed order, one that keeps the blame is kept, and the round begins
again until none is left. Blame is the stage and tensor of the first finding, or the reason of an error without its numbers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moeproof.harness import modes
from moeproof.harness.cases.case import Case
from moeproof.harness.judging.judge import judge, judge_lean
from moeproof.harness.registry import load_rank_pairs
from moeproof.harness.shrinking.child import Child
from moeproof.harness.shrinking.on_ranks import RankAttempts
from moeproof.harness.shrinking.reductions import reductions
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.errors import ContractError, check

MAX_RUNS, MAX_SECONDS, DEADLINE = 400, 60.0, 20.0
HANG_DEADLINE = 5.0
"""Seconds for a case once the first has timed out: a hang would otherwise cost the whole deadline at every step."""
BAD = (Outcome.FAIL, Outcome.FLAKY, Outcome.ERROR, Outcome.TIMEOUT)
Attempt = Callable[[Case, bool], Verdict]
"""(case, lean) -> verdict. A lean attempt makes one call and compares the values only."""


@dataclass(frozen=True)
class Step:
    """One accepted reduction."""

    axis: str
    case: Case
    seconds: float

    def __str__(self) -> str:
        return f"{self.seconds:6.1f} s  {self.axis}: {self.case}"


@dataclass(frozen=True)
class Shrunk:
    """What came of shrinking. `verdict` is the small case's own; `complete` False where time or runs ended it."""

    start: Case
    candidate: str
    """As it was named, so that the replay line finds it."""
    verdict: Verdict
    steps: tuple[Step, ...]
    runs: int
    seconds: float
    complete: bool

    @property
    def case(self) -> Case:
        return self.verdict.case

    @property
    def tokens(self) -> int:
        return self.case.problem.T

    @property
    def replay(self) -> str:
        """The line that repeats the small failure."""
        transport = f" --transport {self.verdict.transport}" if self.verdict.transport else ""
        return f'moeproof replay "{self.case}" --candidate {self.candidate}{transport}'

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "from": str(self.start),
            "to": str(self.case),
            "steps": [{"axis": s.axis, "case": str(s.case), "seconds": round(s.seconds, 3)} for s in self.steps],
            "tokens": self.tokens,
            "runs": self.runs,
            "seconds": round(self.seconds, 3),
            "complete": self.complete,
            "blame": blame(self.verdict),
            "replay": self.replay,
        }


def blame(verdict: Verdict) -> str:
    """What must stay the same: outcome, stage and tensor of the first finding, or the reason without its numbers."""
    if verdict.findings:
        first = verdict.findings[0]
        return f"{verdict.outcome} {first.stage or 'CALL'} {first.tensor if first.stage else _kind(first.message)}"
    return f"{verdict.outcome} {_kind(verdict.reason)}"


def _kind(words: str) -> str:
    """A message without its numbers and without what follows a number: sizes change when a case shrinks.

    Of what ranks say only the first line counts, without the collective that it names: they are fewer in a smaller case.
    """
    words = re.sub(r", (?:inside|after) collective .*? at \S+:\d+", "", words.split("\n")[0])
    return re.sub(r"[-+]?\d[\w.]*", "#", words)


def shrink(
    thing: object,
    case: Case,
    device: str | None = None,
    max_runs: int = MAX_RUNS,
    max_seconds: float = MAX_SECONDS,
    on_step: Callable[[Step], None] = lambda step: None,
    transport: str = "gloo",
) -> Shrunk:
    """Shrink a failing case of a candidate. A candidate given by name runs in child processes, so it may crash or hang;
    an object (Candidate, Pair, callable) runs in this process. A case on several ranks runs on ranks over `transport`.

    Raises ContractError where the candidate does not fail on the case: there is nothing to shrink.
    """
    if case.ranks > 1:
        pair = load_rank_pairs([thing])[0] if isinstance(thing, str) else thing
        check(isinstance(pair, RankPair), f"the case has ranks={case.ranks}: it needs a RankPair, not a {type(pair).__name__}")
        ranks = RankAttempts(thing, pair, transport)  # type: ignore[arg-type]
        name = thing if isinstance(thing, str) else ""
        try:
            return search(name, ranks, case, max_runs, max_seconds, on_step, ranks.fresh)
        finally:
            ranks.close()
    if not isinstance(thing, str):
        return search("", lambda c, lean: _here(thing, c, device, lean), case, max_runs, max_seconds, on_step)
    child = Child(thing, "device" if modes.default_device() == "cuda" else "interpret", DEADLINE)

    def fresh() -> None:
        """No history, and the whole deadline again: a slow case must not pass for a hang in the end."""
        child.close()
        child.deadline = DEADLINE

    try:
        return search(thing, lambda c, lean: _there(child, c, lean), case, max_runs, max_seconds, on_step, fresh)
    finally:
        child.close()


def _here(thing: object, case: Case, device: str | None, lean: bool) -> Verdict:
    return judge_lean(thing, case, device) if lean else judge(thing, case, device)


def _there(child: Child, case: Case, lean: bool) -> Verdict:
    verdict = child.judge(case, lean)
    if verdict.outcome is Outcome.TIMEOUT:
        child.deadline = min(child.deadline, HANG_DEADLINE)
    return verdict


def search(
    name: str,
    attempt: Attempt,
    case: Case,
    max_runs: int = MAX_RUNS,
    max_seconds: float = MAX_SECONDS,
    on_step: Callable[[Step], None] = lambda step: None,
    fresh: Callable[[], None] = lambda: None,
    simpler_ones: Callable[[Case], Iterator[tuple[str, Case]]] = reductions,
) -> Shrunk:
    """Shrink whatever `attempt` judges. `fresh` is called before a case is confirmed; `simpler_ones` says what is tried."""
    begin = time.perf_counter()
    verdict = attempt(case, False)
    check(verdict.outcome in BAD, f"nothing to shrink: the verdict is {verdict.outcome} on {case}")
    wanted = blame(verdict)
    # Where one call shows it too, one call an attempt will do.
    lean = blame(attempt(case, True)) == wanted
    runs, steps = 2, []
    tried: set[Case] = {case}
    small, complete = case, False

    def spent() -> bool:
        return runs >= max_runs or time.perf_counter() - begin > max_seconds

    while not complete and not spent():
        complete = True
        for axis, simpler in simpler_ones(small):
            if simpler in tried:
                continue
            if spent():
                complete = False
                break
            tried.add(simpler)
            runs += 1
            if blame(attempt(simpler, lean)) == wanted:
                small = simpler
                steps.append(Step(axis, simpler, time.perf_counter() - begin))
                on_step(steps[-1])
                complete = False
                break
    kept, verdict = _confirmed(attempt, case, steps, wanted, fresh)
    return Shrunk(case, name or verdict.candidate, verdict, tuple(kept), runs, time.perf_counter() - begin, complete)


def _confirmed(
    attempt: Attempt, case: Case, steps: list[Step], wanted: str, fresh: Callable[[], None]
) -> tuple[list[Step], Verdict]:
    """The last step that a process without history blames alike: what replays. The case itself is beyond doubt."""
    for count in range(len(steps), -1, -1):
        fresh()
        verdict = attempt(steps[count - 1].case if count else case, False)
        if blame(verdict) == wanted:
            return steps[:count], verdict
    raise ContractError(f"{case} does not fail the same way twice: it cannot be shrunk")
