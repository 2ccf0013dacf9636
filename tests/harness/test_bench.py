"""Bench and tune: the arithmetic of roofs and ratios, wrong results have no time, and the search finds what it looks for."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from moeproof.harness.cli import app
from moeproof.harness.timing import bench, tune
from moeproof.harness.timing import points as bench_points
from moeproof.harness.timing.bench import Options, Reading, geomean_between, geomean_vs, measure, read_peers
from moeproof.harness.timing.inputs import answer, make_sets
from moeproof.harness.timing.points import Work, grid, least
from moeproof.harness.timing.tune_table import nearest, weak
from moeproof.reference.contract import Candidate, Claims, ContractError, Inputs
from moeproof.reference.contract.candidate import Tuning
from moeproof.reference.eager.candidates import candidates as eager_candidates

EAGER = next(c for c in eager_candidates() if isinstance(c, Candidate) and "out" in c.shows)
SMALL = Work("qwen3", 5, small=True)
ROOT = Path(__file__).parents[2]


def test_the_grid_is_the_one_of_the_stored_peers() -> None:
    peers = read_peers(ROOT / "docs" / "results" / "h100-peers.csv")
    points = {("bf16", w.model, w.routing, w.M) for w in grid()}

    assert len(points) == 44
    assert points == {key for key in peers if key[0] == "bf16"}
    assert all(p["best"] == min(p.values()) for p in peers.values())


def test_the_least_work_counts_each_hit_expert_once() -> None:
    sets = make_sets(SMALL, 2, "cpu")
    p = SMALL.problem
    hit = sum(s.topk_ids.unique().numel() for s in sets) / 2
    per_expert = 3 * p.H * p.I

    assert least(sets).flops == 2 * p.T * p.K * per_expert
    assert least(sets).nbytes == 2 * (hit * per_expert + 2 * p.T * p.H)
    assert not torch.equal(sets[0].hidden_states, sets[1].hidden_states)
    assert sets[0].w1.data_ptr() == sets[1].w1.data_ptr()
    assert bench_points.Least(2e12, 1e9).roof_us(100.0, 1000.0) == pytest.approx(20000.0)
    assert bench_points.Least(2e9, 1e9).roof_us(100.0, 1000.0) == pytest.approx(1000.0)


def test_an_answer_in_chunks_is_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_sets(SMALL, 1, "cpu")[0]
    whole = answer(inputs, Claims()).value
    monkeypatch.setattr("moeproof.harness.timing.inputs.ORACLE_BYTES", 1)
    parts = answer(inputs, Claims()).value

    assert torch.allclose(whole.value, parts.value, rtol=1e-12)
    assert whole.bound is not None and parts.bound is not None
    assert torch.allclose(whole.bound, parts.bound, rtol=1e-6)


def _broken(inputs: Inputs) -> torch.Tensor:
    out = bench.out_of(EAGER.run(inputs)).clone()
    out[-1, -1] += 1
    return out


def test_a_wrong_result_has_no_time() -> None:
    broken = Candidate(name="broken", run=_broken)
    good, bad = measure([EAGER, broken], [SMALL], "cpu", Options())

    assert good.us > 0 and good.checked == SMALL.problem.T * SMALL.problem.H and not good.reason
    assert math.isnan(bad.us) and bad.reason.startswith("wrong: COMBINE out") and "token 4" in bad.reason
    assert "us" not in bad.record()


def test_geometric_means() -> None:
    def reading(name: str, M: int, us: float) -> Reading:
        return Reading(name, "qwen3", M, "uniform", "bf16", us=us)

    found = [reading("a", 1, 10.0), reading("a", 16, 40.0), reading("b", 1, 20.0), reading("b", 16, math.nan)]
    peers = {("bf16", "qwen3", "uniform", 1): {"best": 20.0}, ("bf16", "qwen3", "uniform", 16): {"best": 20.0, "x": 80.0}}

    assert geomean_vs(found, peers) == {"a": {"best": 1.0, "x": 2.0}, "b": {"best": 1.0}}
    assert geomean_between(found) == {"a": {"b": 2.0}, "b": {"a": 0.5}}


def test_peers_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="does not exist"):
        read_peers(tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("kind,shape\nbf16,qwen3\n")
    with pytest.raises(ContractError, match="lacks the columns M, best_peer"):
        read_peers(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--model", "qwen"], "qwen3"), (["--routing", "flat"], "zipf"), (["--tokens", "0"], "positive")]
)
def test_wrong_usage_is_one_message(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", "eager", *arguments])

    assert isinstance(result.exception, ContractError) and words in str(result.exception)


def _tuning(times: dict[str, float]) -> Tuning:
    """Two letters, each an axis; starts at aa and cc."""
    return Tuning(
        run=lambda inputs, text: EAGER.run(inputs) if times[text] else _broken(inputs),
        starts=lambda problem, e: ["aa", "cc"],
        axes=("left", "right"),
        vary=lambda text, axis: [new + text[1] if axis == "left" else text[0] + new for new in "abc"],
        compiled=lambda problem, e: list(times),
        row=lambda problem, e: f"E={e}",
        selectable=lambda: list(times),
    )


TIMES = {"aa": 10.0, "ba": 8.0, "ab": 9.0, "cb": 9.0, "ca": 9.0, "bb": 5.0, "bc": 7.0, "cc": 20.0}


def test_the_search_takes_one_axis_after_the_other() -> None:
    asked = []

    def evaluate(text: str) -> float | str:
        asked.append(text)
        return TIMES[text] if text != "ca" else "wrong: GEMM1"

    found = tune.search((SMALL,), _tuning(TIMES), [], evaluate, math.inf)

    assert found.best == "bb" and found.wrong == {"ca": "wrong: GEMM1"}
    assert asked == ["aa", "cc", "ba", "ca", "bb", "bc"]


def test_what_is_known_comes_first_and_the_last_few_decide() -> None:
    asked = []

    def evaluate(text: str) -> float:
        asked.append(text)
        return TIMES[text]

    found = tune.search((SMALL,), _tuning(TIMES), ["bc", "bb"], evaluate, math.inf)
    assert asked[:4] == ["bc", "bb", "aa", "cc"]

    found.final = {"bb": (5.0, 9.0), "bc": (6.0, 7.0)}
    assert found.best == "bc", "timed again, over both routings"


def test_a_table_is_written_cell_by_cell_and_a_wrong_configuration_never(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = replace(EAGER, tuning=_tuning(TIMES | {"aa": 0.0}))
    monkeypatch.setattr(tune, "load_candidates", lambda names: [tunable])
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"plans": {"E=16": {"1": "kept"}}, "measured": {}}))
    works = [replace(SMALL, M=2), replace(SMALL, M=2, routing="zipf")]
    found = list(tune.tune("any", works, path, "cpu", 1, 60.0, lambda line: None))
    table = json.loads(path.read_text())

    assert [set(s.wrong) for s in found] == [{"aa"}]
    assert table["plans"]["E=16"]["1"] == "kept" and table["plans"]["E=16"]["2"] == found[0].best != "aa"
    assert set(table["measured"]) == {"qwen3 M=2 uniform", "qwen3 M=2 zipf"}
    assert str(tmp_path) not in table["made"]["command"] and not list(tmp_path.glob("*.part*"))


def test_what_is_tried_first_is_what_was_best_nearby() -> None:
    measured = {
        f"{model} M={M} uniform": {"plan": f"{model} {M}"}
        for model, M in (("qwen3", 256), ("qwen3", 4096), ("qwen3", 1), ("mixtral", 256), ("gone", 1024))
    }

    assert nearest(Work("qwen3", 1024), measured) == ["mixtral 256", "qwen3 256", "qwen3 4096"]


def test_weak_points_come_with_all_their_routings(tmp_path: Path) -> None:
    def reading(M: int, routing: str, us: float) -> dict[str, object]:
        return {"candidate": "a", "model": "qwen3", "M": M, "routing": routing, "kind": "bf16", "us": us}

    path = tmp_path / "bench.json"
    path.write_text(
        json.dumps({"readings": [reading(64, "uniform", 9.0), reading(64, "zipf", 11.0), reading(16, "uniform", 9.0)]})
    )
    works = [Work("qwen3", 64), Work("qwen3", 64, "zipf"), Work("qwen3", 16), Work("qwen3", 1)]
    peers = {("bf16", "qwen3", w.routing, w.M): {"best": 10.0} for w in works}

    assert weak(works, path, peers, "a", 1.0) == [works[0], works[1], works[3]], "a point without a reading is weak"
    assert weak(works, path, peers, "a", 0.9) == [works[3]]


def test_a_batched_pair_is_timed_without_its_taps() -> None:
    """Its `out` is checked like any other's, and no peer of the standard layout is held against it."""
    from moeproof.harness.judging.pairs import as_candidate
    from moeproof.optimized.candidates import candidates as optimized_candidates

    pair = next(c for c in optimized_candidates() if c.name == "triton-batched")
    work = replace(SMALL, layout="batched")
    readings = list(measure([as_candidate(pair), EAGER], [work], "cpu", Options(seconds=0.01)))

    assert readings[0].us > 0 and readings[0].kind == "bf16 batched" and not readings[0].reason
    assert "batched" in readings[1].reason
