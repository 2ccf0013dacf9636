"""The pipelines with nothing planted: every alarm is false."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.grounds import QUIET, STATEFUL, ground_of, judged
from moeproof.harness.verdict import Outcome

SINGLE = ("layer", "world", "tensor")
FEW = 3
"""Cases that the grounds see whose check makes a dozen calls."""
ALL = 60
"""Cases that every single-call ground sees; the rest they share in turn."""


@dataclass(frozen=True)
class Healthy:
    """Tensors judged, what raised an alarm, and how many cases the vacuity gate refused."""

    checks: int = 0
    alarms: tuple[str, ...] = ()
    vacuous: int = 0

    def __add__(self, other: Healthy) -> Healthy:
        return Healthy(self.checks + other.checks, self.alarms + other.alarms, self.vacuous + other.vacuous)


def grounds_of(number: int, case: Case) -> tuple[str, ...]:
    """Which grounds see the case of this number."""
    if case.problem.quant.quantised:
        return ("quant",)
    some = SINGLE if number < ALL else (SINGLE[number % len(SINGLE)],)
    return some + (STATEFUL if number < FEW else ())


def healthy(numbered: Iterable[tuple[int, Case]]) -> Healthy:
    """The grounds with nothing planted over the cases."""
    total = Healthy()
    for number, case in numbered:
        for kind in grounds_of(number, case):
            schemes = {"": QUANTISED} if kind == "quant" else {}
            blank = Fault("healthy", f"healthy.{kind}", "", "", (), {"": {}}, ground=kind, schemes=schemes)
            pipeline, thing = ground_of(blank, number)
            verdict = judged(blank, pipeline, thing, case)
            checks = len(verdict.worst) or int(verdict.outcome is Outcome.PASS)
            alarms = () if verdict.outcome in QUIET else (f"{kind}: {verdict}",)
            total += Healthy(checks, alarms, int(verdict.outcome is Outcome.VACUOUS))
    return total
