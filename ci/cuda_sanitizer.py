"""The CUDA stages under compute-sanitizer: `python ci/cuda_sanitizer.py` runs what its tools watch, our own kernels only.

For each tool there are planted faults that it must report: one that sees nothing has shown nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import patch

import torch
from cuda_jobs import faults, planted

from moeproof.harness import modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import activation, combine, dispatch, grouped_gemm, quant_stages, quantise, stages
from moeproof.optimized.cuda.align import batch_rows
from moeproof.optimized.quant.gemm import Rows
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import quant_checks
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
WATCHED = (*((tool, "") for tool in TOOLS), *((fault.tool, fault.name) for fault in faults.FAULTS if fault.tool))
"""(tool, fault planted)."""
CASES = (
    "T=17,H=50,I=50,E=60,K=6,routing=minus1",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block,routing=minus1",
    "T=1100,H=16,I=8,E=60,K=8",
    "T=17,H=56,I=48,E=60,K=6,dtype=fp32,act=swigluoai,router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "T=9,H=50,I=50,E=5,K=2,scheme=fp8_token",
    "T=9,H=64,I=48,E=7,K=3,ep=2,strided=1,router=softmax_topk:fused_shared=1",
    "T=5,H=64,I=48,E=8,K=1,dtype=fp16,weight_on_input=1,router=softmax:bias:scale=6",
    "T=9,H=1152,I=96,E=5,K=2,scheme=int8_token,routing=minus1",
    "T=9,H=288,I=160,E=5,K=2,scheme=mxfp4_w4a4,act=swigluoai,strided=1",
    "T=5,H=64,I=48,E=8,K=2,router=softmax:bias:zero_experts=4:scale=6",
    # Batches that take the quantisers of many rows.
    "T=2100,H=1160,I=512,E=4,K=2,scheme=fp8_token,routing=minus1",
    "T=2100,H=1024,I=512,E=4,K=2,scheme=mxfp4_w4a4",
)


def _move_only(a: Tensor, w: Tensor, out: Tensor, alignment: Alignment, slots_per_row: int, bias: Tensor | None = None) -> None:
    """Around a product: rows are gathered and scattered. The product is another library's, and gives ones."""
    grouped_gemm.gather(a, alignment, out.size(0), slots_per_row)
    grouped_gemm.group_ends(alignment)
    grouped_gemm.scatter(_ones(alignment.sorted_slots.numel(), out), out, alignment)


def _ones(count: int, like: Tensor) -> Tensor:
    """(count, columns of `like`), copied from the host: what a kernel that is not watched wrote would count as unwritten."""
    with _waiting("default"):
        return torch.ones(count, like.size(1), dtype=like.dtype).cuda()


@contextlib.contextmanager
def _waiting(mode: str) -> Iterator[None]:
    """While active, torch lets the host wait for the GPU ("default"), or raises where it would ("error")."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def nothing_read_back() -> Iterator[None]:
    """While active, nothing is copied from the GPU to the host: any such copy raises.

    Its source would be what a kernel that is not watched wrote, which to initcheck is memory that nobody wrote. So it is with
    the one look that stages take by themselves, at a scale's values when they first see it: here they were made on the host.
    """
    with patch.object(quant_checks, "check_scale_values", lambda name, scale, fmt: None), _waiting("error"):
        yield


def _move_scaled(x: Rows, w: object, out: Tensor, alignment: Alignment, slots_per_row: int, dtype: object) -> None:
    assert x.scale is not None
    if x.scale.size(0) > 1 and x.scale.dtype == torch.float32:
        grouped_gemm.gather(x.scale, alignment, out.size(0), slots_per_row)
    _move_only(_ones(out.size(0), out), out, out, alignment, 1)


PLAIN = replace(stages.CUDA, gemm1=_move_only, gemm2=_move_only)
QUANT = replace(quant_stages.CUDA, gemm1=_move_scaled, gemm2=_move_scaled)


def _once(inputs: Inputs) -> None:
    slots = Slots(inputs.topk_ids, inputs.problem.weight_experts, inputs.w1.size(0), inputs.expert_map)
    shown = stages.run(inputs, PLAIN) if inputs.problem.scheme == "none" else quant_stages.run(inputs, QUANT)
    dispatch.clear_dead(shown["y"].flatten(0, 1), slots)
    _in_regions(inputs, slots)


def _in_regions(inputs: Inputs, slots: Slots) -> None:
    """The stages of the batched layout, in regions that some experts' rows overflow."""
    p, x, capacity = inputs.problem, inputs.hidden_states, 4
    rows, counts = batch_rows(slots, capacity)
    R = inputs.w1.size(0) * capacity
    regions = torch.empty(R, x.size(1), dtype=x.dtype, device=x.device)
    dispatch.move_rows(x, regions, slots.K, rows=rows)
    gate_up, h = (torch.empty(R, width, dtype=x.dtype, device=x.device) for width in (p.N, p.I))
    gate_up = _ones(R, gate_up)
    activation.activate(gate_up, h, p.act, counts=counts)
    if p.scheme != "none" and p.quant.a2 is not None:
        quantise.quantise(gate_up, p.quant.a2, p.fmt, act=p.act, counts=counts)
    combine.combine(regions, inputs.topk_weights, slots, torch.empty_like(x, memory_format=torch.contiguous_format), rows=rows)


def watched(fault: str, cases: int) -> None:
    """The first `cases` of CASES, with a fault planted where one is named."""
    modes.choose("device")
    with planted(fault) if fault else contextlib.nullcontext():
        for line in CASES[:cases]:
            # Made on the host: how torch makes them is not what is watched.
            made = make_inputs(parse_case(line), "cpu")
            inputs = made.map({name: tensor.cuda() for name, tensor in made.tensors()})
            with nothing_read_back():
                _once(inputs)
            torch.cuda.synchronize()
            print("ran", line, flush=True)


def sanitize(tool: str, fault: str, cases: int, seconds: float) -> dict[str, object]:
    """What a tool reports: errors (None where it came to no end), and its own words."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=moeproof"]
    command += ["--show-backtrace", "no", "--print-limit", "20"]
    command += [sys.executable, __file__, "--fault", fault, "--cases", str(cases)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    row: dict[str, object] = {"tool": tool, "fault": fault, "errors": None}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=max(seconds, 1.0))
        text, ended = done.stdout + done.stderr, True
    except subprocess.TimeoutExpired as error:
        text = "".join(part.decode(errors="replace") for part in (error.stdout, error.stderr) if part)
        ended = False
    row |= {"ran": len(re.findall(r"^ran ", text, re.M)), "seconds": round(time.perf_counter() - start, 1)}
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    counts = [int(n) for line in summary[-1:] for n in re.findall(r"(\d+) (?:error|hazard)", line)]
    if ended and counts:
        row["errors"] = max(counts)
    row["summary"] = summary[-1].strip("= ") if summary else text[-800:]
    if row["errors"]:
        row["first"] = [line for line in text.splitlines() if line.startswith("========")][1 : 6 if fault else 24]
    return row


def well(row: dict[str, object]) -> bool:
    """Nothing reported on all cases of the healthy sources; something on faulty ones."""
    return bool(row["errors"]) if row["fault"] else row["errors"] == 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fault", default="", help="plant this one of tests/cuda/cuda_faults.py")
    parser.add_argument("--cases", type=int, default=len(CASES))
    options = parser.parse_args()
    watched(options.fault, options.cases)
