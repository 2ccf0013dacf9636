"""The sources compile for each architecture without a warning, and no kernel spills or uses local memory."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from moeproof.optimized.cuda import toolkit

needs_nvcc = pytest.mark.skipif(toolkit.nvcc() is None, reason="no nvcc here: install the CUDA toolkit or set CUDA_HOME")
JOBS = [(stage, "sm_90a") for stage in toolkit.STAGES] + [("rows", "sm_80"), ("rows", "sm_100")]
"""Every source for Hopper, and a short one for its neighbours: `python -m moeproof.optimized.cuda.build` takes the others."""


@needs_nvcc
@pytest.mark.parametrize(("stage", "arch"), JOBS)
def test_compiles_without_spills(stage: str, arch: str, tmp_path: Path) -> None:
    compiler = toolkit.nvcc()
    assert compiler is not None
    command = [*toolkit.command(compiler, stage, arch, tmp_path / "out"), "-Xptxas=-v", "-Werror=all-warnings"]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr[-3000:]
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert stacks
    assert all(numbers == ("0", "0", "0") for numbers in stacks), done.stderr[-3000:]


def test_no_fast_math() -> None:
    """It would replace division, exp and subnormals by approximations that the candidates do not claim."""
    assert not [flag for flag in toolkit.FLAGS if "fast" in flag]
