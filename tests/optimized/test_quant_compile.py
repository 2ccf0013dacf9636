"""Every kind of quantised kernel compiles for sm_90 from unmodified host code, without spilling registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import moeproof

SCHEMES = ("fp8_block", "int8_token", "int4_w4a16_zp_g32", "mxfp4_w4a8", "nvfp4")
"""compile_quant.py without arguments compiles all."""
SOURCES = Path(moeproof.__file__).parents[1]


def test_kernels_compile_without_spills() -> None:
    """In a child: Triton compiles only in a process that never interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(SOURCES)}
    script = Path(__file__).with_name("compile_quant.py")
    child = subprocess.run([sys.executable, script, *SCHEMES], env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-3000:]
    lines = [json.loads(line) for line in child.stdout.splitlines()]

    assert {line["kernel"] for line in lines} >= {"_quantise", "_scaled_gemm"}
    assert not [line for line in lines if line["stack"]]
    assert all(line["registers"] <= 255 for line in lines)
