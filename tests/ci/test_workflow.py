"""The committed workflow is the generated one, and `ci/run` says what it cannot do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TASKS = ("install", "verify", "test", "lint", "types", "golden", "matrix", "wheel", "cuda")


def _run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, **environment}, timeout=60
    )


def test_the_committed_workflow_is_current() -> None:
    result = _run(sys.executable, "ci/workflow.py", "--check")

    assert (result.returncode, result.stdout.strip()) == (0, "current")


def test_every_job_of_the_workflow_is_a_task() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tasks = re.findall(r"run: ci/run (\w+)", text)

    assert set(tasks) <= set(TASKS)
    assert {"lint", "test", "verify", "golden", "matrix"} <= set(tasks)
    assert tasks == re.findall(r"^  (\w+):$", text.partition("jobs:")[2], re.MULTILINE)


@pytest.mark.skipif(shutil.which("bash") is None, reason="ci/run is a bash script")
@pytest.mark.parametrize("arguments", [(), ("tset",)])
def test_an_unknown_task_lists_the_tasks(arguments: tuple[str, ...]) -> None:
    result = _run("bash", "ci/run", *arguments)

    assert result.returncode == 2
    assert f"TASK is one of: {' '.join(TASKS)}" in result.stderr


@pytest.mark.skipif(shutil.which("bash") is None, reason="ci/run is a bash script")
def test_a_missing_python_is_named() -> None:
    result = _run("bash", "ci/run", "lint", PYTHON="no-such-python")

    assert result.returncode == 2
    assert "no 'no-such-python' here" in result.stderr
