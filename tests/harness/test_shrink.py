"""Shrinking keeps the blame, ends small, is deterministic, and survives candidates that crash or hang."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pipeline
import pytest
import test_faults
import torch
from user_side import KERNEL, moeproof

from moeproof.harness.cases.case import parse_case
from moeproof.harness.shrinking.reductions import reductions, smaller
from moeproof.harness.shrinking.shrink import Step, blame, shrink
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, ContractError, Inputs

BIG = (
    "T=33,H=104,I=72,E=8,K=2,dtype=fp16,shared=24,scale_on_sum=2.5,storage=KN,"
    "router=softmax:renorm=sum,values=hetero,routing=zipf,strided=1,seed=5"
)
WRECKS = (
    KERNEL
    + """
import os, time

def aborts(hidden_states, *rest):
    if hidden_states.shape[0] > 2:
        os.abort()
    return moe(hidden_states, *rest)

def hangs(hidden_states, w1, *rest):
    if w1.shape[0] >= 3:
        time.sleep(1000)
    return moe(hidden_states, w1, *rest)

def leaves(hidden_states, *rest):
    os._exit(3)

def raises(hidden_states, *rest):
    if hidden_states.shape[1] > 20:
        raise RuntimeError(f"no room for {hidden_states.shape[1]} columns")
    return moe(hidden_states, *rest)

calls = []

def late(*arguments):
    calls.append(1)
    return moe(*arguments) * (0 if len(calls) > 40 else 1)
"""
)
SAMPLE = [f for f in test_faults.FAULTS if f.token is None][::3]
"""Faults planted at a fixed token need that token: they are no measure of shrinking."""


def test_sizes_come_down_to_landmarks_first() -> None:
    assert smaller(33) == [0, 1, 2, 3, 4, 8, 16, 24, 32]
    assert smaller(2) == [0, 1]
    assert smaller(0) == []
    assert all(n < 1000 for n in smaller(1000))


def test_every_reduction_is_a_case_and_differs() -> None:
    case = parse_case(BIG)
    found = list(reductions(case))

    assert {axis for axis, _ in found} >= {
        "E",
        "K",
        "T",
        "I",
        "H",
        "shared",
        "values",
        "routing",
        "strided",
        "dtype",
        "storage",
    }
    assert all(simpler != case and parse_case(str(simpler)) == simpler for _, simpler in found)


@pytest.mark.parametrize("values", ["groups", "pin"])
def test_a_scheme_is_switched_off_where_the_fault_needs_none(values: str) -> None:
    """With plain values where the recipe is about scales."""
    case = parse_case(f"T=9,H=256,I=96,E=3,K=2,scheme=mxfp8,values={values},seed=41")
    found = shrink(Candidate("zeros", lambda i: torch.zeros_like(i.hidden_states)), case, "cpu")

    assert "scheme" in {axis for axis, _ in reductions(case)}
    assert found.case.problem.scheme == "none" and found.tokens == 1


@pytest.mark.parametrize("fault", SAMPLE, ids=lambda f: f.name)
def test_a_planted_fault_comes_down_to_four_tokens(fault: test_faults.Fault) -> None:
    candidate = pipeline.candidate(fault.name, **fault.plant)
    found = shrink(candidate, parse_case(fault.case), "cpu")
    first = found.verdict.findings[0]

    assert found.complete
    assert found.tokens <= 4, found
    assert first.stage is fault.stage
    assert found.seconds < 60
    SECONDS.append(found.seconds)


SECONDS: list[float] = []


def test_the_median_takes_less_than_ten_seconds() -> None:
    assert len(SECONDS) >= 5, "the faults above run first"
    assert statistics.median(SECONDS) < 10


def _last_slot_missing(inputs: Inputs) -> torch.Tensor:
    weights = inputs.topk_weights.clone()
    weights[:, -1] = 0
    return pipeline.Pipeline()(inputs.map({"topk_weights": weights}))["out"]


def test_structure_goes_first_and_the_same_way_each_time() -> None:
    steps: list[Step] = []
    case = parse_case("T=33,H=104,I=72,E=8,K=2,dtype=fp16,storage=KN,values=hetero,routing=zipf,strided=1,seed=5")
    found = shrink(Candidate("drops", _last_slot_missing), case, "cpu", on_step=steps.append)
    again = shrink(Candidate("drops", _last_slot_missing), case, "cpu")

    assert str(found.case) == "T=1,H=1,I=1,E=1,K=1,values=int,seed=0"
    assert tuple(steps) == found.steps
    assert [s.case for s in steps] == [s.case for s in again.steps]
    assert steps[0].axis == "E"
    assert found.replay == f'moeproof replay "{found.case}" --candidate drops'


def test_a_trigger_is_kept() -> None:
    """Wrong only with more than 16 rows and an inner dimension that is no multiple of 16."""

    def picky(inputs: Inputs) -> torch.Tensor:
        out = pipeline.Pipeline()(inputs)["out"]
        return out * 0 if inputs.problem.T > 16 and inputs.problem.H % 16 else out

    found = shrink(Candidate("picky", picky), parse_case("T=33,H=104,I=72,E=8,K=2,seed=1"), "cpu")
    assert (found.case.problem.T, found.case.problem.H % 16 > 0, found.case.problem.E) == (17, True, 1)


def test_limits_end_it() -> None:
    few = shrink(Candidate("drops", _last_slot_missing), parse_case("T=33,H=104,I=72,E=8,K=2"), "cpu", max_runs=4)

    assert not few.complete
    assert few.runs <= 4
    assert few.verdict.outcome is Outcome.FAIL


def test_nothing_to_shrink_is_said() -> None:
    right = Candidate("right", lambda i: pipeline.Pipeline()(i)["out"])
    with pytest.raises(ContractError, match="nothing to shrink: the verdict is PASS"):
        shrink(right, parse_case("T=3,H=8,I=8,E=4,K=2"), "cpu")


def test_a_candidate_that_fails_once_is_not_shrunk() -> None:
    calls = []

    def once(inputs: Inputs) -> torch.Tensor:
        calls.append(1)
        return pipeline.Pipeline()(inputs)["out"] * (0 if len(calls) == 1 else 1)

    with pytest.raises(ContractError, match="does not fail the same way twice"):
        shrink(Candidate("once", once), parse_case("T=3,H=8,I=8,E=4,K=2"), "cpu")


@pytest.fixture
def wrecks(tmp_path: Path) -> str:
    path = tmp_path / "wrecks.py"
    path.write_text(WRECKS)
    return str(path)


@pytest.mark.parametrize(
    ("name", "words", "left"),
    [
        ("aborts", "ERROR the candidate ended its process by SIGABRT", "T=3,H=1,I=1,E=1,K=1"),
        ("leaves", "ERROR the candidate ended its process with exit code #", "T=0,H=1,I=1,E=1,K=1"),
        ("raises", "ERROR the candidate raised RuntimeError: no room for # columns", "T=0,H=21,I=1,E=1,K=1"),
    ],
)
def test_crashes_are_shrunk_in_children(name: str, words: str, left: str, wrecks: str) -> None:
    found = shrink(f"{wrecks}:{name}", parse_case("T=9,H=40,I=24,E=4,K=2,seed=0"))

    assert blame(found.verdict) == words
    assert str(found.case).startswith(left)
    assert found.complete


def test_hangs_are_shrunk_under_a_deadline(wrecks: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeproof.harness.shrinking.shrink.DEADLINE", 4.0)
    monkeypatch.setattr("moeproof.harness.shrinking.shrink.HANG_DEADLINE", 1.0)
    found = shrink(f"{wrecks}:hangs", parse_case("T=2,H=8,I=8,E=4,K=1,seed=0"), max_seconds=60)

    assert found.verdict.outcome is Outcome.TIMEOUT
    assert "no answer within 4 s" in found.verdict.reason
    assert found.case.problem.E == 3


def test_what_depends_on_history_is_confirmed_in_a_fresh_process(wrecks: str) -> None:
    """The candidate goes wrong after forty calls, whatever the case: alone, no small case fails."""
    with pytest.raises(ContractError, match="nothing to shrink: the verdict is PASS"):
        shrink(f"{wrecks}:late", parse_case("T=9,H=40,I=24,E=4,K=2"))


def test_the_command_prints_steps_and_a_replay_line(
    wrecks: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "T=5,H=24,I=16,E=4,K=2"
    assert moeproof(monkeypatch, "shrink", line, "--candidate", f"{wrecks}:raises", "--json") == 1
    shown = capsys.readouterr()
    record = json.loads(shown.out)
    assert set(record) == {"from", "to", "steps", "tokens", "runs", "seconds", "complete", "blame", "replay"}
    assert record["replay"] == f'moeproof replay "{record["to"]}" --candidate {wrecks}:raises'
    assert "s  E: T=5" in shown.err

    assert moeproof(monkeypatch, "shrink", line, "--candidate", f"{wrecks}:moe") == 2
    assert "nothing to shrink" in capsys.readouterr().err
