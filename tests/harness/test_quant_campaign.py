"""A sample of ci/quant_schemes.py: pieces add up whatever their order, and healthy candidates pass in both layouts."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from types import ModuleType

import pytest

from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.quant_campaign import CANDIDATES, PRIMARY, SIZES, Row, draw, judge_piece, judges
from moeproof.harness.registry import load_candidates
from moeproof.reference.contract import Candidate
from moeproof.reference.contract.problem import LAYOUTS

CI = Path(__file__).resolve().parents[2] / "ci"


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CI))
    return importlib.import_module("quant_schemes")


@pytest.fixture(scope="module")
def candidates() -> dict[str, Candidate]:
    return {c.name: c for c in load_candidates(CANDIDATES)}


def test_pieces_add_up_in_any_order() -> None:
    row = Row("mxfp8", "batched")
    for first, end in ((8, 12), (0, 4), (12, 16)):
        row.add(Row("mxfp8", "batched", [[first, end]], verdicts=end - first, worst={"y": end / 100}))

    assert row.done == [[0, 4], [8, 16]] and row.cases == row.verdicts == 12
    assert row.missing(20) == [*range(4, 8), *range(16, 20)]
    assert row.worst == {"y": 0.16}


def test_a_results_file_is_continued_where_it_ends(campaign: ModuleType, tmp_path: Path) -> None:
    path, rows = tmp_path / "r.json", {(s, layout): Row(s, layout) for s in QUANTISED for layout in LAYOUTS}
    rows["nvfp4", "standard"].add(Row("nvfp4", "standard", [[0, 8]], 9, outcomes={"PASS": 8, "FAIL": 1}, failures=["FAIL: .."]))
    campaign.write(path, {"runs": [{"command": "one"}], "rows": rows}, {"command": "two"}, list(QUANTISED))
    done = campaign.read(path)
    todo = list(campaign.pieces(done["rows"], ["mxfp8", "nvfp4"], 0, 16, "interpret"))

    assert done["rows"] == rows and [run["command"] for run in done["runs"]] == ["one", "two"]
    assert [piece[:2] for piece in todo[:4]] == [(s, layout) for s in ("mxfp8", "nvfp4") for layout in LAYOUTS], "not in turns"
    assert [seeds for s, layout, seeds in todo if (s, layout) == ("nvfp4", "standard")] == [list(range(8, 16))]


@pytest.mark.parametrize("mode", SIZES)
def test_seeds_are_cases_of_their_own_that_share_what_kernels_are_compiled_for(mode: str) -> None:
    share = SIZES[mode].share
    for scheme in QUANTISED:
        cases = [draw(scheme, "standard", seed, mode) for seed in range(2 * share)]
        shapes = {(c.problem.T, c.problem.H, c.problem.I, c.problem.E, c.problem.K, c.strided) for c in cases[:share]}

        assert len(set(cases)) == len(cases) and len(shapes) == 1
        assert sum(c.values == "pin" for c in cases) == share // 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_candidates_of_a_layout_take_turns(layout: str, candidates: dict[str, Candidate]) -> None:
    for scheme in QUANTISED:
        judging = {judges(draw(scheme, layout, seed, "interpret"), candidates, seed)[0].name for seed in range(4)}

        assert judging <= set(PRIMARY[layout]) and len(judging) == len(PRIMARY[layout]) // 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4"])
def test_healthy_candidates_pass_a_piece(scheme: str, layout: str, candidates: dict[str, Candidate]) -> None:
    row = judge_piece(scheme, layout, range(4), "interpret", time.time() + 60, candidates)

    assert row.outcomes == {"PASS": 4} and row.probes == 1 and row.cases == 4, row.failures
    assert row.checked > 4000 and max(row.worst.values()) <= 1
