"""The checks of a trial, in order. Each looks at one thing and returns a Ruling, or None to let the next one look."""

from __future__ import annotations

from dataclasses import replace

from moeproof.harness.judging.gate import blind
from moeproof.harness.judging.history import HISTORY_CHECKS
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.judging.misround import count_misrounded
from moeproof.harness.judging.relations import related
from moeproof.harness.judging.trial import Check, Ruling, Trial, differences, failed, wrong
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.stages import TENSORS


def values(trial: Trial) -> Ruling | None:
    """Every shown tensor of the first run within its bound; of every run where the bits may differ from run to run."""
    if ruling := wrong(trial, trial.results):
        return ruling
    if trial.candidate.claims.deterministic == "none":
        for run in trial.runs[1:]:
            if ruling := trial.right(run):
                return ruling
    return None


def misrounding(trial: Trial) -> Ruling | None:
    """No more wrongly rounded elements than the stage's own error explains."""
    findings = count_misrounded(trial.shown, trial.wanted)
    return Ruling(Outcome.FAIL, tuple(findings)) if findings else None


def memory(trial: Trial) -> Ruling | None:
    """The runs under the poison patterns agree bit for bit, unless the candidate claims no such thing."""
    if trial.candidate.claims.deterministic == "none" or len(trial.runs) < 2:
        return None
    changed = differences(trial.runs, trial.inputs)
    if not changed:
        return None
    again = trial.again(trial.inputs, PATTERNS[0])
    if failed(again) or differences([trial.runs[0], again], trial.inputs):
        words = "two runs on the same inputs differ, and the candidate claims the same bits from run to run"
        return Ruling(Outcome.FLAKY, tuple(Finding(TENSORS[n], n, words) for n in changed))
    # Where one of the patterns gives a wrong result, that is the better story: it has a stage and coordinates.
    for pattern, run in zip(PATTERNS[1:], trial.runs[1:], strict=False):
        if ruling := trial.right(run):
            where = f"where unwritten memory holds '{pattern}'"
            return replace(ruling, findings=tuple(replace(f, message=f"{f.message} {where}") for f in ruling.findings))
    words = f"the result depends on what unwritten memory held ({' against '.join(PATTERNS)})"
    return Ruling(Outcome.FAIL, tuple(Finding(TENSORS[n], n, words) for n in changed))


def history(trial: Trial) -> Ruling | None:
    """What the case's own `history` asks for: another case in between, a side stream, a captured graph."""
    check = HISTORY_CHECKS[trial.case.history]
    return check(trial) if check else None


def relation(trial: Trial) -> Ruling | None:
    """The case's own metamorphic `relation`: tokens permuted, experts relabelled, ..: a witness that needs no oracle."""
    return related(trial) if trial.case.relation != "none" else None


def vacuity(trial: Trial) -> Ruling | None:
    """The L0 gate: a rule that would also pass grossly wrong results has proved nothing."""
    reasons = blind(trial)
    return Ruling(Outcome.VACUOUS, reason="; ".join(reasons)) if reasons else None


CHECKS: tuple[Check, ...] = (values, misrounding, memory, history, relation, vacuity)
LEAN: tuple[Check, ...] = (values,)
"""Enough to reproduce a wrong value: what shrinking repeats."""
