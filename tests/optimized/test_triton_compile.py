"""Every kernel compiles for sm_90 from unmodified host code, without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import moeproof

PARTS = ("pairs", "every tile", "every rule", "deepseek prefill", "ragged")
"""compile_only.py without arguments compiles more."""
SOURCES = Path(moeproof.__file__).parents[1]


def test_kernels_compile_without_spills() -> None:
    """In a child: Triton compiles only in a process that never interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SOURCES)}
    script = Path(__file__).with_name("compile_only.py")
    child = subprocess.run([sys.executable, script, *PARTS], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    kernels = {line["kernel"] for line in lines}

    assert kernels >= {"_route", "_count", "_place", "_grouped", "_batched", "_activate", "_combine", "_move", "_clear_dead"}
    assert kernels >= {"_fused", "_vector_gate_up", "_vector_down"}
    assert not [line for line in lines if line["stack"]]
    assert all(line["registers"] <= 255 for line in lines)
