"""A sample of ci/quant_schemes.py: pieces add up whatever their order, every optimized candidate has its rows, and healthy
candidates pass."""

from __future__ import annotations

import importlib
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.quant_campaign import (
    ALONE,
    CANDIDATES,
    INTERPRETED,
    PRIMARY,
    SIZES,
    Key,
    Row,
    draw,
    judge_piece,
    rows,
    whose_turn,
)
from moeproof.harness.registry import find_candidates, load_candidates
from moeproof.optimized.cuda import toolkit
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
        ratios = {"y": end / 100}
        row.add(Row("mxfp8", "batched", [[first, end]], verdicts=end - first, worst=ratios, sums=ratios))

    assert row.done == [[0, 4], [8, 16]] and row.cases == row.verdicts == 12
    assert row.missing(20) == [*range(4, 8), *range(16, 20)]
    assert row.worst == row.sums == {"y": 0.16}


def test_a_results_file_is_continued_where_it_ends(campaign: ModuleType, tmp_path: Path) -> None:
    path, known = tmp_path / "r.json", {key: Row(*key[:2], alone=key[2]) for key in rows("interpret")}
    by_turns, alone = ("mxfp4_w4a16", "standard", ""), ("mxfp4_w4a16", "standard", "triton-mxfp4")
    piece = Row(*by_turns[:2], [[0, 8]], 9, outcomes={"PASS": 8, "FAIL": 1}, failures=["FAIL: .."])
    known[by_turns].add(piece)
    campaign.write(path, {"runs": [{"command": "one"}], "rows": known}, {"command": "two"})
    done = campaign.read(path)
    todo = list(campaign.pieces(done["rows"], [by_turns, alone], 0, 16, "interpret"))

    assert done["rows"] == known and [run["command"] for run in done["runs"]] == ["one", "two"]
    assert todo == [(by_turns, list(range(8, 16))), (alone, list(range(8))), (alone, list(range(8, 16)))], "not in turns"


def test_the_committed_rows_are_continued(campaign: ModuleType) -> None:
    """Rows by turns that were written before others were alone mean what they meant."""
    known = campaign.read(CI.parent / "docs" / "results" / "quant-campaign-interpreted.json")["rows"]

    assert {(scheme, layout, "") for scheme in QUANTISED for layout in LAYOUTS} <= set(known) <= set(rows("interpret"))
    assert all(row.cases == row.verdicts == row.outcomes["PASS"] >= 60 for row in known.values())


@pytest.mark.parametrize("mode", SIZES)
def test_seeds_are_cases_of_their_own_that_share_what_kernels_are_compiled_for(mode: str) -> None:
    share = SIZES[mode].share
    for scheme in QUANTISED:
        cases = [draw(scheme, "standard", seed, mode) for seed in range(2 * share)]
        shapes = {(c.problem.T, c.problem.H, c.problem.I, c.problem.E, c.problem.K, c.strided) for c in cases[:share]}

        assert len(set(cases)) == len(cases) and len(shapes) == 1
        assert sum(c.values == "pin" for c in cases) == share // 2


def test_draws_spread_scales_over_rows_channels_groups_and_experts() -> None:
    """At least 8 binades of each: in `groups` of all but experts, which `experts` spreads as well."""
    drawn = Counter(draw("fp8_tensor", "standard", seed, "device").values for seed in range(500))
    w1, w2 = (experts_spread(parse_case("T=4,H=64,I=64,E=4,K=2,scheme=fp8_tensor,values=experts"), n) for n in ("w1", "w2"))

    assert drawn["groups"] > 100 and drawn["pin"] == 125 and drawn["experts"] >= 20
    assert w1 >= 8 and w2 >= 8


def experts_spread(case: Case, name: str) -> float:
    """Binades between the scales of experts."""
    scale = getattr(make_inputs(case), f"{name}_scale").double().flatten()
    return float((scale.max() / scale.min()).log2())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_candidates_of_a_layout_take_turns(layout: str, candidates: dict[str, Candidate]) -> None:
    for scheme in QUANTISED:
        judging = {whose_turn(draw(scheme, layout, seed, "interpret"), candidates, seed).name for seed in range(4)}

        assert judging <= set(PRIMARY[layout]) and len(judging) == len(PRIMARY[layout]) // 2


def test_every_optimized_candidate_of_a_quantised_scheme_has_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an H100 with a compiler: by turns or alone, each does every scheme it says it does, and no other."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(toolkit, "architecture", lambda _: "sm90")
    monkeypatch.setattr(toolkit, "missing", lambda _: None)
    problems = [
        draw(s, layout, SIZES["device"].share * n, "device").problem
        for s in QUANTISED
        for layout in LAYOUTS
        for n in range(100)
    ]
    found: set[Key] = set()
    for candidate in find_candidates():
        if candidate.name.startswith("eager"):
            continue  # the reference's own
        done = {(p.scheme, p.layout) for p in problems if candidate.supports(p) is None}
        assert not done or candidate.name in CANDIDATES, f"{candidate.name} is in no row"
        if candidate.name in ALONE:
            assert {scheme for scheme, _ in done} == set(ALONE[candidate.name]), candidate.name
            found |= {(scheme, layout, candidate.name) for scheme, layout in done}
        else:
            assert all(candidate.name in PRIMARY[layout] for _, layout in done)
            found |= {(scheme, layout, "") for scheme, layout in done}

    assert found == set(rows("device")) and set(rows("interpret")) < found


def test_who_judges_alone_gets_what_it_supports(candidates: dict[str, Candidate]) -> None:
    for name in INTERPRETED:
        for scheme in ALONE[name]:
            cases = [draw(scheme, "standard", seed, "interpret", alone=candidates[name]) for seed in range(40)]

            assert not [reason for case in cases if (reason := candidates[name].supports(case.problem))]
            assert len(set(cases)) == 40 and sum(case.values == "pin" for case in cases) == 10


HEALTHY = [(s, layout, "") for s in ("fp8_block", "nvfp4") for layout in LAYOUTS]
HEALTHY += [(ALONE[name][-1], "standard", name) for name in INTERPRETED]


@pytest.mark.parametrize("key", HEALTHY, ids="-".join)
def test_healthy_candidates_pass_a_piece(key: Key, candidates: dict[str, Candidate]) -> None:
    row = judge_piece(key, range(4), "interpret", time.time() + 60, candidates)

    assert row.outcomes == {"PASS": 4} and row.probes == 1 and row.cases == 4, row.failures
    assert row.checked > 2000 and max(row.worst.values()) <= 1
    assert all(ratio <= row.worst[name] for name, ratio in row.sums.items())
