"""Campaigns: pieces add up, resume, and are never counted twice; an alarm comes with its replay line."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.compiled_sample import RUN, TOKENS, aligned_case, aligned_layers, compiled_case, layers
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging import campaign
from moeproof.harness.judging.campaign import Cell, Piece, Record
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract import ContractError, Inputs
from moeproof.reference.contract.problem import LAYOUTS
from moeproof.reference.contract.stages import Stage
from moeproof.reference.eager import candidates

CASE = parse_case("T=5,H=32,I=16,E=4,K=2,seed=3")
PASSED = Verdict(Outcome.PASS, "mine", CASE, checked=10, worst={"out": 0.25, "y": 0.0})
FAILED = Verdict(Outcome.FAIL, "mine", CASE, (Finding(Stage.GEMM1, "gate_up", "is off"),))


def _record(first: int, end: int, *verdicts: Verdict) -> Record:
    record = Record("interpret")
    for verdict in verdicts:
        record.add_verdict(verdict)
    record.finish(Piece("random", "torch", first, end))
    return record


def test_records_add_up_and_read_back(tmp_path: Path) -> None:
    whole = _record(0, 8, PASSED, PASSED)
    whole.merge(_record(8, 16, FAILED, PASSED))
    campaign.write(tmp_path / "record.json", whole)
    again = campaign.read(tmp_path / "record.json")

    assert again == whole
    assert again.done == {"random, torch": [(0, 16)]}
    assert again.checks == Counter({Cell("mine", "none", "standard", "normal"): 6})
    assert again.outcomes == Counter({("mine", "PASS"): 3, ("mine", "FAIL"): 1})
    assert (again.cases, again.facts, again.alarms) == (16, 30, 1)
    assert again.spreads["y"].bins[0] == 3 and again.spreads["out"].bins[3] == 3 and again.spreads["out"].largest == 0.25


def test_an_alarm_keeps_its_replay_line() -> None:
    record = _record(0, 8, FAILED)

    assert record.alarms == 1 and FAILED.replay in record.alarm_texts[0]


@pytest.mark.parametrize(
    ("outcome", "alarms"), [(Outcome.ERROR, 1), (Outcome.TIMEOUT, 1), (Outcome.VACUOUS, 0), (Outcome.UNSUPPORTED, 0)]
)
def test_what_accuses_the_candidate_is_an_alarm(outcome: Outcome, alarms: int) -> None:
    record = _record(0, 8, Verdict(outcome, "mine", CASE, reason="so"))

    assert record.alarms == alarms and record.checks.total() == 0
    assert record.as_dict()["vacuous"] == (outcome is Outcome.VACUOUS)


def test_a_real_alarm_is_counted() -> None:
    """A candidate that is off by one place in `out`, judged by the real judge."""

    def run(inputs: Inputs) -> dict[str, object]:
        shown = dict(healthy.run(inputs))
        shown["out"] = shown["out"] * 1.25
        return shown

    healthy = next(c for c in candidates() if c.name == "eager-stages")
    record = _record(0, 1, judge(replace(healthy, name="broken", run=run), CASE, "cpu"))

    assert record.alarms == 1 and record.checks.total() == 0
    assert "COMBINE" in record.alarm_texts[0] and 'moeproof replay "' in record.alarm_texts[0]


def test_no_piece_is_counted_twice() -> None:
    record = _record(0, 8, PASSED)
    with pytest.raises(ContractError, match="cases 4 to 11 would be counted twice"):
        record.merge(_record(4, 12, PASSED))
    with pytest.raises(ContractError, match="do not add up"):
        record.merge(Record("device"))


def test_a_campaign_goes_on_with_what_is_missing() -> None:
    record = _record(0, 10, PASSED)
    record.finish(Piece("random", "torch", 20, 24))
    rest = list(record.missing(Piece("random", "torch", 0, 30), 8))

    assert [(piece.first, piece.end) for piece in rest] == [(10, 16), (16, 20), (24, 30)]
    for piece in rest:
        record.finish(piece)
    assert record.done == {"random, torch": [(0, 30)]}
    assert not list(record.missing(Piece("random", "torch", 0, 30), 8))


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps({"rows": []}))
    with pytest.raises(ContractError, match="holds no record of a campaign"):
        campaign.read(path)


def test_the_compiled_sample_needs_few_kernels() -> None:
    """Every layer has one of everything a kernel is compiled for but tokens; every scheme has both layouts."""
    drawn = [compiled_case(number) for number in range(2 * RUN * len(layers()))]
    sizes = {(c.problem.scheme, c.problem.layout, c.problem.H, c.problem.I, c.problem.dtype) for c in drawn}

    assert {(c.problem.scheme, c.problem.layout) for c in drawn} == {
        (s, layout) for s in ("none", *QUANTISED) for layout in LAYOUTS
    }
    assert len(sizes) <= len(layers()) and {c.problem.T for c in drawn} == set(TOKENS)
    assert {c.problem.dtype for c in drawn} == {"bf16", "fp16", "fp32"}
    assert len({str(c) for c in drawn}) == len(drawn)
    assert all(parse_case(str(case)) == case for case in drawn)


def test_the_aligned_sample_has_layers_for_library_products_and_fused_kernels() -> None:
    drawn = [aligned_case(number).problem for number in range(RUN * len(aligned_layers()))]
    for name, scheme in (("triton-fp8-fused", "fp8_token"), ("triton-fp8-fused", "fp8_block"), ("triton-mxfp4", "mxfp4_w4a16")):
        (candidate,) = load_candidates([name])
        assert any(candidate.supports(problem) is None for problem in drawn if problem.scheme == scheme)
    assert all(p.H % 16 == 0 and p.I % 16 == 0 and p.storage == "NK" for p in drawn)
