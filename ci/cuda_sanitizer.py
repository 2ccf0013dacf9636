"""The CUDA stages under compute-sanitizer: python ci/cuda_sanitizer.py runs what its tools watch.

The project's own kernels only. Two controls are faults that a tool must report: one that sees nothing has shown nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time

import torch
from cuda_jobs import planted

from moeproof.harness import modes
from moeproof.harness.case import parse_case
from moeproof.harness.inputs import make_inputs
from moeproof.optimized.cuda.candidates import candidates

CONTROLS = (("memcheck", "combine.past_end"), ("racecheck", "combine.no_barrier"))
WATCHED = (*((tool, "") for tool in ("memcheck", "racecheck", "initcheck", "synccheck")), *CONTROLS)
"""(tool, fault planted)."""
CASES = (
    "T=17,H=50,I=50,E=60,K=6,routing=minus1",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block,routing=minus1",
    "T=17,H=56,I=48,E=60,K=6,dtype=fp32,act=swigluoai,router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "T=1100,H=16,I=8,E=60,K=8",
    "T=9,H=50,I=50,E=5,K=2,scheme=fp8_token",
    "T=9,H=64,I=48,E=7,K=3,ep=2,strided=1,router=softmax_topk:fused_shared=1",
    "T=5,H=64,I=48,E=8,K=2,router=softmax:bias:zero_experts=4:scale=6",
)
SKIPPED = "triton-cuda-gemm"
"""All its CUDA stages are those of `cuda`."""


def watched(fault: str, cases: int) -> None:
    """Run the first `cases` of CASES through every candidate, with a fault planted where one is named."""
    modes.choose("device")
    with planted(fault) if fault else contextlib.nullcontext():
        for line in CASES[:cases]:
            case = parse_case(line)
            for candidate in candidates():
                if candidate.name != SKIPPED and candidate.supports(case.problem) is None:
                    candidate.run(make_inputs(case, "cuda"))
                    torch.cuda.synchronize()
                    print("ran", candidate.name, line, flush=True)


def sanitize(tool: str, fault: str, cases: int, seconds: float) -> dict[str, object]:
    """What a tool reports: errors (None where it came to no end), and its own words."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=moeproof"]
    command += [sys.executable, __file__, "--fault", fault, "--cases", str(cases)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    row: dict[str, object] = {"tool": tool, "fault": fault, "errors": None}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
        text, ended = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as error:
        text = "".join(part.decode(errors="replace") for part in (error.stdout, error.stderr) if part)
        ended = False
    row["ran"] = text.count("ran ")
    row["seconds"] = round(time.perf_counter() - start, 1)
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    counts = [int(n) for line in summary[-1:] for n in re.findall(r"(\d+) (?:error|hazard)", line)]
    if ended and counts:
        row["errors"] = max(counts)
    row["summary"] = summary[-1].strip("= ") if summary else text[-800:]
    if not fault and row["errors"]:
        row["first"] = [line for line in text.splitlines() if line.startswith("========")][:14]
    return row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", default="", help="plant this one of tests/cuda/cuda_faults.py")
    parser.add_argument("--cases", type=int, default=len(CASES))
    options = parser.parse_args()
    watched(options.fault, options.cases)
