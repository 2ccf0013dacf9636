"""Verdicts that cannot lie."""

from __future__ import annotations

import pytest

from moeproof.harness.api import count, exit_code
from moeproof.harness.cases.case import parse_case
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract import Stage

CASE = parse_case("T=2,H=4,I=4,E=2,K=1")
FOUND = (Finding(Stage.ACT, "h", "wrong value"),)


@pytest.mark.parametrize(
    ("outcome", "rest", "rule"),
    [
        (Outcome.PASS, {}, "must have checked something"),
        (Outcome.PASS, {"checked": 3, "findings": FOUND}, "found nothing"),
        (Outcome.FAIL, {"checked": 3}, "needs a finding"),
        (Outcome.FLAKY, {}, "needs a finding"),
        (Outcome.ERROR, {}, "needs a reason"),
        (Outcome.TIMEOUT, {}, "needs a reason"),
        (Outcome.VACUOUS, {}, "needs a reason"),
        (Outcome.UNSUPPORTED, {}, "needs a reason"),
    ],
)
def test_impossible_verdicts_cannot_be_built(outcome: Outcome, rest: dict[str, object], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        Verdict(outcome, "c", CASE, **rest)  # type: ignore[arg-type]


def test_exit_codes() -> None:
    ok = Verdict(Outcome.PASS, "c", CASE, checked=1)
    bad = Verdict(Outcome.FAIL, "c", CASE, findings=FOUND)
    not_for_it = Verdict(Outcome.UNSUPPORTED, "c", CASE, reason="no")
    vacuous = Verdict(Outcome.VACUOUS, "c", CASE, reason="no")

    assert [exit_code(v) for v in ([ok], [ok, not_for_it], [ok, bad], [ok, vacuous], [not_for_it], [])] == [0, 0, 1, 1, 3, 3]
    assert count([ok, bad, ok])["PASS"] == 2


def test_a_finding_reads_as_one_line() -> None:
    finding = Finding(
        Stage.GEMM1,
        "gate_up",
        "wrong value",
        token=3,
        slot=1,
        expert=5,
        column=7,
        got=1.5,
        want=1.0,
        allowed=0.01,
        bad=2,
        total=9,
        pattern="only slot 1",
    )
    assert str(finding) == (
        "GEMM1 gate_up: wrong value at token 3, slot 1, expert 5, column 7: got 1.5, want 1 (off by 0.5, allowed 0.01); "
        "2 of 9 bad; only slot 1"
    )
