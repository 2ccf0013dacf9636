"""The pipelines with nothing planted: every alarm is false."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moeproof.harness.cases.case import Case
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.run import QUIET, ground_of, judged
from moeproof.harness.verdict import Outcome

SINGLE = ("layer", "world", "tensor")
SEVERAL = ("sequence", "replay")
"""Grounds whose check makes a dozen calls."""
FEW = 3
"""Cases of each list that these see."""


@dataclass(frozen=True)
class Healthy:
    """Tensors judged, and what raised an alarm."""

    checks: int
    alarms: tuple[str, ...]


def healthy(cases: Sequence[Case]) -> Healthy:
    """Every ground with nothing planted, over the cases."""
    checks, alarms = 0, []
    for number, case in enumerate(cases):
        for kind in SINGLE + (SEVERAL if number < FEW else ()):
            blank = Fault("healthy", f"healthy.{kind}", "", "", (), {"": {}}, ground=kind)
            pipeline, thing = ground_of(blank, number)
            verdict = judged(blank, pipeline, thing, case)
            checks += len(verdict.worst) or int(verdict.outcome is Outcome.PASS)
            if verdict.outcome not in QUIET:
                alarms.append(f"{kind}: {verdict}")
    return Healthy(checks, tuple(alarms))
