"""The plugin in a user's own test run: parametrised candidates, options, failure text, -n auto."""

from __future__ import annotations

import os

import pytest
from user_side import KERNEL

CONFTEST = (
    KERNEL
    + """
def halved(*arguments):
    return moe(*arguments) / 2

def pytest_moeproof_candidates():
    return [moe, halved]
"""
)
TEST = """
import torch

def test_kernel(moe_candidate, moe_case, moe_judge):
    assert moe_judge(moe_candidate, moe_case).checked > 0
    assert torch.get_num_threads() == 1
"""
LINE = "T=5,H=24,I=16,E=4,K=2,seed=1"


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    # As installed: the plugin comes by its entry point, whichever folder the run starts in.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in [os.environ.get("PYTHONPATH", "")] if p))
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TEST)
    return pytester


def test_failure_shows_finding_and_replay_line(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--moe-case", LINE, "--moe-backend", "moe", "--moe-backend", "halved", "-q")

    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(["*COMBINE out: wrong value*", f'*moeproof replay "{LINE}" --candidate conftest.py:halved*'])


def test_quick_tier_under_xdist(project: pytest.Pytester) -> None:
    result = project.runpytest_subprocess("--moe-backend", "moe", "--moe-tier", "quick", "-n", "2", "-q")
    outcomes = result.parseoutcomes()

    assert outcomes.get("passed", 0) >= 10
    assert "failed" not in outcomes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--moe-case", "T=5"], "*moeproof: --moe-case: the case line lacks H, I, E, K*"),
        (["--moe-backend", "cutlass"], "*--moe-backend cutlass matches no candidate; there are:*moe*"),
        (["--moe-tier", "huge"], "*invalid choice: 'huge'*"),
        (["--moe-device", "device"], "*mode 'device' needs an NVIDIA GPU*"),
    ],
)
def test_bad_options_are_usage_errors(project: pytest.Pytester, arguments: list[str], words: str) -> None:
    result = project.runpytest_subprocess(*arguments)

    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([words])


def test_the_plugin_imports_no_torch_for_other_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("import sys\n\ndef test_plain():\n    assert 'torch' not in sys.modules\n")
    pytester.runpytest_subprocess("-q").assert_outcomes(passed=1)
