"""What became of one planting, and the hunt through a list of cases that finds it out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.fault import Dice, Fault
from moeproof.harness.faults.grounds import QUIET, STATEFUL, inputs_once, judged, planted, vacuous
from moeproof.harness.faults.place import right_place, visible
from moeproof.harness.faults.replayed import Replayed
from moeproof.harness.judging.memory import PATTERNS, Poison, guard_inputs
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
TWINS = 3
"""Cases at least that a neutral twin sees; the one that caught its fault among them."""


@dataclass(frozen=True)
class Hunt:
    """What became of one variant of a class, in one scheme where the class is about quantisation."""

    id: str
    variant: str
    scheme: str = ""
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
    outcome: str = ""
    twin_checks: int = 0
    twin_alarms: tuple[str, ...] = ()
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Without what other processes took of the machine meanwhile."""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.id, self.variant, self.scheme)))


class Watch:
    """Wall and processor time since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    @property
    def wall(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def cpu(self) -> float:
        return time.process_time() - self._cpu


def fires(fault: Fault, variant: str, number: int, case: Case, scheme: str = "") -> bool:
    """Would one plain call fire it, were chance on its side? Spares the judgement of cases that cannot.

    Where judging means a dozen calls or thousands, it must change something that is shown, too.
    """
    pipeline, thing, witness = planted(fault, variant, number, scheme, dice=Dice(1.0))
    if thing.supports(case.problem) is not None:
        return False
    if fault.ground == "sequence":
        return True
    if fault.ground == "replay":
        return _replay_shows(fault, variant, case)
    given, _ = guard_inputs(inputs_once(case), "nan")
    try:
        with Poison("nan"):
            shown = pipeline(given)
    except Exception:  # what the fault threw shows in the judgement
        return True
    if not fault.random or not witness.fired:
        return witness.fired > 0
    twin = planted(fault, variant, number, scheme, armed=False)[0]
    given, _ = guard_inputs(inputs_once(case), "nan")
    with Poison("nan"):
        healthy = twin(given)
    return visible(healthy, shown, inputs_once(case))


def _replay_shows(fault: Fault, variant: str, case: Case) -> bool:
    """Whether the second replay shows something else than the healthy one."""
    shown = []
    other = make_inputs(replace(case, seed=case.seed + 1), "cpu")
    for armed in (False, True):
        pipeline, _, _ = planted(fault, variant, 0, armed=armed)
        assert isinstance(pipeline, Replayed)
        static = make_inputs(case, "cpu")
        try:
            again = pipeline.capture(static)
            for (_, t), (_, new) in zip(static.tensors(), other.tensors(), strict=True):
                t.copy_(new)
            shown.append({name: t.clone() for name, t in again().items()})
        except Exception:  # what the fault threw shows in the judgement
            return True
    return visible(shown[0], shown[1], other)


def hunt(fault: Fault, variant: str, scheme: str, cases: Sequence[Case], start: int = 0) -> Hunt:
    """Case after case from number `start` on until one catches it; its twin on the same cases, and on TWINS at least.

    A case counts only where the twin PASSes it: what the vacuity gate refuses has caught nothing.
    """
    watch = Watch()
    result = Hunt(fault.id, variant, scheme)
    tried: list[tuple[int, Case]] = []
    twins: dict[int, Verdict] = {}
    for number in range(start, len(cases)):
        case = cases[number]
        if scheme and case.problem.scheme != scheme:
            continue
        if not fires(fault, variant, number, case, scheme):
            continue
        pipeline, thing, witness = planted(fault, variant, number, scheme)
        verdict = judged(fault, pipeline, thing, case)
        result = replace(result, triggered=result.triggered or witness.fired > 0)
        tried.append((number, case))
        if witness.fired and verdict.outcome not in QUIET and not (fault.ground in STATEFUL and vacuous(case)):
            twins[number] = twin_of(fault, variant, scheme, number, case)
            if twins[number].outcome is not Outcome.VACUOUS:
                result = replace(caught_by(result, fault, variant, verdict, number), at=str(case))
                break
    others = [(n, c) for n, c in enumerate(cases) if not scheme or c.problem.scheme == scheme]
    for number, case in tried[::-1] + others:
        if len(twins) < TWINS and number not in twins:
            twins[number] = twin_of(fault, variant, scheme, number, case)
    alarms = tuple(str(v) for v in twins.values() if v.outcome not in QUIET)
    return replace(result, twin_checks=len(twins), twin_alarms=alarms, seconds=watch.wall, cpu_seconds=watch.cpu)


def twin_of(fault: Fault, variant: str, scheme: str, number: int, case: Case) -> Verdict:
    """The verdict on the neutral twin."""
    pipeline, thing, _ = planted(fault, variant, number, scheme, armed=False)
    return judged(fault, pipeline, thing, case)


def caught_by(result: Hunt, fault: Fault, variant: str, verdict: Verdict, number: int) -> Hunt:
    """The hunt that this verdict ends."""
    first = verdict.findings[0] if verdict.findings else None
    return replace(
        result,
        caught=True,
        right_stage=(first.stage if first else None) in fault.blame,
        place=_place(fault, variant, verdict, number, result.scheme),
        needed=number + 1,
        number=number,
        case=str(verdict.case),
        finding=str(first) if first else verdict.reason,
        outcome=str(verdict.outcome),
    )


def _place(fault: Fault, variant: str, verdict: Verdict, number: int, scheme: str) -> bool | None:
    """Healthy and faulty side by side on the same inputs: did the fault change what the finding names?

    Under each poison pattern, since a fault that reads unwritten memory changes other places with each; one must agree.
    """
    if not verdict.findings or fault.random or fault.ground in STATEFUL:
        return None
    inputs = make_inputs(verdict.case, "cpu")
    known = []
    for pattern in PATTERNS:
        pair = list(_side_by_side(pattern, fault, variant, number, scheme, inputs))
        if len(pair) == 2:
            known.append(right_place(verdict.findings[0], pair[0], pair[1], inputs))
    agreed = [place for place in known if place is not None]
    return any(agreed) if agreed else None


def _side_by_side(
    pattern: str, fault: Fault, variant: str, number: int, scheme: str, inputs: Inputs
) -> Iterator[Mapping[str, Tensor]]:
    """What the twin and the fault show; fewer than two where one throws."""
    for armed in (False, True):
        pipeline, _, _ = planted(fault, variant, number, scheme, armed)
        given, _ = guard_inputs(inputs, pattern)
        try:
            with Poison(pattern):
                yield pipeline(given)
        except Exception:  # a fault that throws shows no tensors to compare
            return
