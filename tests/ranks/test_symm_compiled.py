"""The exchange's kernels compile for sm_90 as each rank launches them: without spills, and with 16-byte stores of rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHILD = Path(__file__).parent / "compile_symm.py"


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_compiles_what_it_launches(rank: int) -> None:
    """Rank 1 as well: Triton makes a constant of every argument that is 1."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    child = subprocess.run([sys.executable, CHILD, str(rank)], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    *kernels, last = map(json.loads, child.stdout.splitlines())

    assert {k["case"] for k in kernels} == {"bf16", "fp8", "every size 1", "eight ranks"}
    assert not [k for k in kernels if k["stack"] or k["registers"] > 128]
    assert last["held launches are as found"]
    assert all(last["wide stores"][name] > 0 for name in ("_dispatch", "_put_sums", "_add_up"))
