"""`moeproof verify --ranks` and the plugin's --moe-ranks: verdicts with the rank, on every transport that runs here."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from user_side import moeproof

from moeproof.reference.contract.world import rank_seed

LINE = "T=16,H=32,I=16,E=5,K=2,routing=zipf,seed=3"
PLACED = "T=16,H=32,I=16,E=5,K=2,routing=zipf,ranks=2,seed=3"
FILE = str(Path(__file__).parent / "rank_candidates.py")


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_verdicts_name_the_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("whole", "halves", "raises", "dies", "sleeps")
    start = time.monotonic()
    code = moeproof(
        monkeypatch,
        "verify",
        *(f"{FILE}:{name}" for name in names),
        *("--case", LINE, "--ranks", "2", "--transport", "gloo", "--deadline", "3", "--json"),
    )
    seconds = time.monotonic() - start
    *verdicts, summary = lines(capsys)
    by_name = {v["candidate"]: v for v in verdicts}

    assert code == 1
    assert [by_name[n]["outcome"] for n in names] == ["PASS", "FAIL", "ERROR", "ERROR", "TIMEOUT"]
    assert [by_name[n]["rank"] for n in names[2:]] == [1, 1, 1]
    assert {v["case"] for v in verdicts} == {PLACED}
    assert {tuple(v["rank_seeds"]) for v in verdicts} == {(rank_seed(3, 0), rank_seed(3, 1))}
    assert by_name["whole"]["checked"] > 16 * 32
    assert by_name["halves"]["findings"][0]["stage"] == "COMBINE"
    assert "rank 1 raised in stage COMBINE" in by_name["raises"]["reason"]
    assert "OverflowError: no room for a third replica" in by_name["raises"]["reason"]
    assert "rank 1 died: killed by SIGKILL in stage COMBINE" in by_name["dies"]["reason"]
    assert "no end within the deadline of 3 s; look at rank 1 in stage COMBINE" in by_name["sleeps"]["reason"]
    assert "in fault: time.sleep(3600)" in by_name["sleeps"]["reason"]
    assert by_name["sleeps"]["replay"] == f'moeproof replay "{PLACED}" --candidate {FILE}:sleeps --transport gloo'
    assert (summary["pass"], summary["fail"], summary["error"], summary["timeout"]) == (1, 1, 2, 1)
    assert seconds < 60


@pytest.mark.parametrize("transport", ["simulated", "gloo"])
def test_replay_runs_a_case_line_on_its_ranks(
    transport: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "T=7,H=32,I=16,E=5,K=2,ranks=3,spread=uneven,seed=4"
    code = moeproof(monkeypatch, "replay", line, "--candidate", f"{FILE}:whole", "--transport", transport)
    out = " ".join(capsys.readouterr().out.split())

    assert code == 0, out
    assert f"PASS whole on {line}" in out


def test_simulated_ranks_name_the_one_that_raised(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code = moeproof(
        monkeypatch, "verify", f"{FILE}:raises", "--case", LINE, "--ranks", "2", "--transport", "simulated", "--json"
    )
    verdict, _ = lines(capsys)

    assert (code, verdict["outcome"], verdict["rank"]) == (1, "ERROR", 1)
    assert verdict["reason"] == "rank 1 raised: OverflowError: no room for a third replica"


def test_presets_that_cannot_be_shared_are_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("mixtral-8x7b", "qwen3-30b-a3b")
    code = moeproof(
        monkeypatch,
        *("verify", f"{FILE}:whole", "--ranks", "12", "--transport", "simulated", "--json"),
        *(word for name in names for word in ("--model", name)),
    )
    captured = capsys.readouterr()
    summary = json.loads(captured.out.splitlines()[-1])

    assert (code, summary["pass"], summary["cases"]) == (0, 1, 2)
    assert "left out: mixtral-8x7b: ranks=12 with tp=1 make 12 groups, but there are 8 experts to share" in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--ranks", "-1"], "ranks=-1 must not be negative"),
        (["--ranks", "2", "--transport", "mpi"], "transport 'mpi' is not known; allowed: auto, simulated, gloo, symm, nccl"),
        (["--ranks", "2", "--deadline", "0"], "deadline=0 must be above 0 seconds"),
        (["--ranks", "8"], "ranks=8 with tp=1 make 8 groups, but there are 5 experts to share"),
        (["--ranks", "2", "--case", "T=4,H=8,I=8,E=4,K=2,ranks=4"], "the case line has ranks=4, and --ranks is 2"),
        (["--ranks", "2", "--mode", "device", "--transport", "gloo"], "mode 'device' does not go with transport gloo"),
    ],
)
def test_bad_input_gets_one_clear_message(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = moeproof(monkeypatch, "verify", f"{FILE}:whole", "--case", LINE, *arguments)
    err = capsys.readouterr().err

    assert code == 2
    assert err.startswith("moeproof: ") and err.count("\n") == 1
    assert words in err


def test_a_candidate_for_one_rank_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert moeproof(monkeypatch, "verify", f"{FILE}:build", "--case", LINE, "--ranks", "2") == 2
    assert "is a function; a candidate for several ranks is a RankPair" in capsys.readouterr().err


CONFTEST = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from rank_candidates import halves, travels, whole

def pytest_moeproof_candidates():
    return [whole, halves, travels]
"""
TEST = """
def test_kernel(moe_candidate, moe_case, moe_judge):
    assert moe_judge(moe_candidate, moe_case).checked > 0
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in [os.environ.get("PYTHONPATH", "")] if p))
    pytester.makepyfile(TEST)
    return pytester


def test_plugin_judges_on_ranks(project: pytest.Pytester) -> None:
    """One candidate is right, one wrong on rank 1, and one is made of a closure, which cannot be sent to a rank."""
    project.makeconftest(CONFTEST)
    chosen = [word for name in ("whole", "travels", "halves") for word in ("--moe-backend", name)]
    result = project.runpytest_subprocess("--moe-ranks", "2", "--moe-transport", "gloo", "--moe-case", LINE, *chosen, "-q")

    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*COMBINE out: wrong value*rank 1*",
            f'*moeproof replay "{PLACED}" --candidate travels --transport gloo*',
            "*cannot be sent to ranks*",
        ]
    )


def test_all_tests_of_a_pytest_process_share_one_pool(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tests over two cases on two workers: two ranks for each worker, started once."""
    pids = project.path / "pids"
    monkeypatch.setenv("MOEPROOF_TEST_PIDS", str(pids))
    project.makeconftest(CONFTEST.replace("halves, travels, whole", "visitor").replace("whole, halves, travels", "visitor"))
    project.makepyfile(TEST + TEST.replace("test_kernel", "test_again"))
    chosen = ["--moe-ranks", "2", "--moe-transport", "gloo", "--moe-backend", "visitor", "-q", "-n", "2"]
    cases = [word for seed in (3, 4) for word in ("--moe-case", LINE.replace("seed=3", f"seed={seed}"))]
    result = project.runpytest_subprocess(*chosen, *cases)

    result.assert_outcomes(passed=4)
    assert len(set(pids.read_text().split())) == 4


def test_bad_options_of_the_plugin_are_usage_errors(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--moe-ranks", "2", "--moe-transport", "mpi")

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--moe-transport: transport 'mpi' is not known; allowed: auto, simulated, gloo*"])
