"""docs/wrong-quantisers.md: every program runs and says what the page says, and the healthy layer passes on the same cases."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.quant_pipeline import QuantPipeline, quant_candidate
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Stage

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "wrong-quantisers.md").read_text(encoding="utf-8")
PROGRAMS = sorted((DOCS / "examples/quantisers").glob("*.py"))
FIRST_STAGE = {"block_from_grid": "GEMM1", "e2m1_ties": "QUANT1", "e8m0_zero": "GEMM1", "fp8_spellings": "QUANT1"}


def _exact(text: str) -> str:
    """Without the figures of findings within a bound: machines sum in other orders."""
    return re.sub(r"wrong value at .*", "wrong value", text)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.stem)
def test_what_a_program_says_is_what_the_page_says(program: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = runpy.run_path(str(program), run_name="__main__")
    said = capsys.readouterr().out

    assert _exact(f"$ python docs/examples/quantisers/{program.name}\n{said}```") in _exact(PAGE)
    public, failed = said.count(": accepted\n"), re.findall(r"^FAIL .*\n  (\w+) .* token \d+, .*column \d+", said, re.MULTILINE)
    assert public == len(failed) >= 1 and set(failed) == {FIRST_STAGE[program.stem]} and "rejected" not in said
    verdict = judge(quant_candidate(QuantPipeline()), parse_case(namespace["CASE"]), "cpu")
    assert verdict.outcome is Outcome.PASS, verdict


def test_every_replay_line_of_the_page_finds_its_candidate_and_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DOCS.parent)
    lines = re.findall(r'moeproof replay "(.*)" --candidate (\S+)', PAGE)

    assert len(lines) == 6
    for case, name in lines:
        (candidate,) = load_candidates([name])
        assert candidate.supports(parse_case(case).problem) is None


def test_the_stages_are_those_of_the_contract() -> None:
    assert set(FIRST_STAGE.values()) <= {stage.value for stage in Stage} and set(FIRST_STAGE) == {p.stem for p in PROGRAMS}
