"""case -> inputs -> candidate -> checks -> verdict."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from moeproof.harness import modes
from moeproof.harness.cases.case import Case
from moeproof.harness.judging.checks import CHECKS, LEAN
from moeproof.harness.judging.explain import explained
from moeproof.harness.judging.history import cannot_remember
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.judging.run import Run, run_once
from moeproof.harness.judging.trial import Check, Ruling, Tally, Trial, failed, home, inputs_of
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate

__all__ = ["judge", "judge_lean", "run_once"]


def judge(
    thing: object,
    case: Case,
    device: str | None = None,
    patterns: Sequence[str] = PATTERNS,
    checks: Sequence[Check] = CHECKS,
) -> Verdict:
    """Run a candidate (a Candidate, a Pair, or a callable) on a case and say what came of it.

    Nothing that the candidate does raises from here: what it throws, returns or damages becomes part of the verdict.
    Fewer `patterns` and `checks` make a quicker, weaker judge: see judge_lean.
    """
    candidate = as_candidate(thing)
    if candidate.claims_in is not None and case.relation != "duplicate":  # which needs the kernels of twice the tokens as well
        candidate = replace(candidate, claims=candidate.claims_in(case.problem))
    device = device or modes.default_device()
    start = time.perf_counter()
    tally = Tally()
    ruling = _rule(candidate, case, device, patterns, checks, tally)
    return Verdict(
        outcome=ruling.outcome,
        candidate=candidate.name,
        case=case,
        findings=ruling.findings,
        reason=ruling.reason,
        checked=tally.checked,
        worst=tally.worst,
        claims=str(candidate.claims),
        seconds=time.perf_counter() - start,
        environment=modes.environment(candidate.backend, device),
        source=candidate.source,
    )


def judge_lean(thing: object, case: Case, device: str | None = None) -> Verdict:
    """One call and one look at the values: enough to see a wrong value, a crash or a hang again, not to PASS anything on."""
    return judge(thing, case, device, PATTERNS[:1], LEAN)


def _one_rank(case: Case) -> str | None:
    return f"the case has ranks={case.ranks}; this candidate runs on one" if case.ranks > 1 else None


def _rule(
    candidate: Candidate, case: Case, device: str, patterns: Sequence[str], checks: Sequence[Check], tally: Tally
) -> Ruling:
    """The first ruling of anything that has one."""
    reason = modes.cannot_run(candidate.backend, device) or _one_rank(case) or candidate.supports(case.problem)
    if reason := reason or cannot_remember(case, device, candidate.backend):
        return Ruling(Outcome.UNSUPPORTED, reason=reason)
    inputs = inputs_of(case, home(case, device))
    runs: list[Run] = []
    for pattern in patterns:
        run = run_once(candidate, inputs, pattern, device)
        if run.refused and case.routing == "beyond":
            # Refusing ids that no expert has is right; ignoring them is too, and then the values are judged.
            return Ruling(Outcome.UNSUPPORTED, reason=f"refuses ids >= E, as it may: {run.error}")
        if ruling := failed(run):
            tally.add(len(run.findings))
            return ruling
        runs.append(run)
    trial = Trial(candidate, case, device, tuple(runs), tally)
    ruling = next((ruling for check in checks if (ruling := check(trial))), Ruling(Outcome.PASS))
    return explained(trial, ruling) if ruling.findings and checks is CHECKS else ruling
