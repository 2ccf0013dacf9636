"""Everything about the CUDA stages that needs a GPU, in one command: build, verdicts, planted faults, sanitizer, timings.

    python ci/cuda_check.py docs/results/cuda-h100.json

Needs nvcc, compute-sanitizer and one NVIDIA GPU; about three minutes on 16 cores. Exit code 0 when every verdict is PASS,
every fault is caught, the sanitizer reports nothing on the healthy sources and something on two faulty ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "cuda"))

import cuda_faults as faults
import cuda_strides as strides
from cuda_timings import copy_bandwidth, timings

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.presets import preset
from moeproof.harness.cases.sample import sample
from moeproof.harness.cases.tiers import cases_of, preset_cases
from moeproof.harness.judging.judge import judge
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome
from moeproof.optimized.cuda import toolkit
from moeproof.optimized.cuda.build import build_all
from moeproof.optimized.cuda.candidates import MIXES, candidates
from moeproof.reference.contract import Candidate

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
CONTROLS = (("memcheck", "combine.past_end"), ("racecheck", "combine.no_barrier"))
"""Faults that a tool must report: a sanitizer that sees nothing has shown nothing."""
SMALL = (
    "T=17,H=50,I=50,E=60,K=6,routing=minus1",
    "T=17,H=56,I=48,E=60,K=6,dtype=fp32,act=swigluoai,router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "T=1100,H=16,I=8,E=60,K=8",
    "T=9,H=64,I=48,E=7,K=3,ep=2,strided=1,router=softmax_topk:fused_shared=1",
    "T=5,H=64,I=48,E=8,K=2,router=softmax:bias:zero_experts=4:scale=6",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block,routing=minus1",
    "T=9,H=50,I=50,E=5,K=2,scheme=fp8_token",
)
QUANTISED = (
    *(f"scheme={name}" for name in ("fp8_tensor_static", "mxfp8", "mxfp8_up", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4_w4a8_static")),
    *(
        f"scheme={name},values={v}"
        for name in ("fp8_token", "fp8_block", "int8_token", "mxfp4_w4a4")
        for v in ("hetero", "pin")
    ),
    "scheme=fp8_block,dtype=fp16,routing=minus1,strided=1",
    "scheme=fp8_token,dtype=fp32,act=swigluoai,routing=dup",
    "scheme=mxfp4_w4a4_up,dtype=fp16,act=relu2_no_mul",
)


def by_name(name: str) -> Candidate:
    return next(c for c in candidates() if c.name == name)


def cases() -> list[str]:
    """Case lines of the quick tier, of every preset as a scaled twin, of random layers, and two at full size."""
    chosen = [*cases_of("quick"), *(case for _, case in preset_cases(8)), *sample(24, 5000)]
    chosen += [Case(replace(preset("qwen3-30b-a3b"), T=t)) for t in (1, 2048)]
    chosen += [parse_case(f"T=33,H=288,I=160,E=8,K=2,{line}") for line in QUANTISED]
    # The healthy twins of the planted faults.
    chosen += [parse_case(fault.case) for fault in faults.FAULTS if fault.case != faults.WIDE]
    return list(dict.fromkeys(str(case) for case in chosen))


def index_width(_: None) -> dict[str, bool]:
    """Stages whose calls on far-apart rows agree with those on small tensors. Runs in a worker process."""
    return {stage: check() for stage, check in strides.checks("cuda").items()}


def verify(job: tuple[str, str]) -> dict[str, object]:
    """The verdict of (candidate, case line); runs in a worker process."""
    modes.choose("device")
    verdict = judge(by_name(job[0]), parse_case(job[1]), "cuda")
    row: dict[str, object] = {"candidate": job[0], "case": job[1], "outcome": str(verdict.outcome), "checked": verdict.checked}
    if verdict.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED):
        row["words"] = str(verdict)[:1500]
    elif verdict.outcome is Outcome.UNSUPPORTED:
        row["words"] = verdict.reason
    return row


def history(name: str) -> dict[str, object]:
    """Graph replay with changed inputs, and a side stream: bits as in a plain call. Runs in a worker process."""
    modes.choose("device")
    run = by_name(name).run
    scheme = "none" if name in MIXES else "fp8_block"
    lines = (f"T=64,H=512,I=256,E=32,K=4,scheme={scheme},seed={seed}" for seed in (1, 2))
    first, second = (make_inputs(parse_case(line), "cuda") for line in lines)
    wanted = [{n: t.clone() for n, t in run(given).items()} for given in (first, second)]  # type: ignore[union-attr]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = {n: t.clone() for n, t in run(first).items()}  # type: ignore[union-attr]
    stream.synchronize()
    held = first.map({n: t.clone() for n, t in first.tensors()})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shown = run(held)
    replays = []
    for given in (second, first):
        for (_, to), (_, source) in zip(held.tensors(), given.tensors(), strict=True):
            to.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        replays.append({n: t.clone() for n, t in shown.items()})  # type: ignore[union-attr]
    compared = [n for n in wanted[0] if n not in ("sorted_slots", "block_expert")]  # their unused tails hold anything

    def equal(a: dict, b: dict) -> bool:  # type: ignore[type-arg]
        return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in compared)

    return {
        "candidate": name,
        "graph_replay": equal(replays[0], wanted[1]) and equal(replays[1], wanted[0]),
        "side_stream": equal(aside, wanted[0]),
    }


def small(fault: str) -> None:
    """A few small layers, for the sanitizer; with a fault planted where one is named."""
    modes.choose("device")
    sources = toolkit.SOURCES
    if fault:
        planted = next(f for f in faults.FAULTS if f.name == fault)
        sources = faults.plant(planted, Path(tempfile.mkdtemp()))
    with patch.object(toolkit, "SOURCES", sources):
        for line in SMALL:
            for candidate in candidates():
                case = parse_case(line)
                if candidate.name != "triton-cuda-gemm" and candidate.supports(case.problem) is None:
                    candidate.run(make_inputs(case, "cuda"))
        torch.cuda.synchronize()


def sanitize(job: tuple[str, str]) -> dict[str, object]:
    """One tool over `small`; only kernels of this project are looked at."""
    tool, fault = job
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=moeproof", sys.executable, __file__]
    command += ["--small", *(["--fault", fault] if fault else [])]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    text = done.stdout + done.stderr
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    counts = [int(n) for line in summary[-1:] for n in re.findall(r"(\d+) (?:error|hazard)", line)]
    row: dict[str, object] = {"tool": tool, "fault": fault, "errors": max(counts) if counts else None}
    row |= {"summary": summary[-1].strip("= ") if summary else text[-600:], "seconds": round(time.perf_counter() - start, 1)}
    if not fault and counts and max(counts):
        row["first"] = [line for line in text.splitlines() if line.startswith("========")][:12]
    print(json.dumps(row), flush=True)
    return row


def hunt(fault: faults.Fault) -> dict[str, object]:
    """Plant a fault, run its case, and say whether it was caught. Runs in a worker process: a fault may crash it."""
    modes.choose("device")
    sources = faults.plant(fault, Path(tempfile.mkdtemp()))
    with patch.object(toolkit, "SOURCES", sources):
        if fault.case == faults.WIDE:
            caught, words = not strides.checks("cuda")[fault.stage](), "differs from the call on small strides"
        else:
            verdict = judge(by_name(fault.candidate), parse_case(fault.case), "cuda")
            words = verdict.findings[0].message if verdict.findings else verdict.reason
            caught = verdict.outcome in (Outcome.FAIL, Outcome.FLAKY) or "CUDA error" in words
    return {"fault": fault.name, "stands_for": fault.stands_for, "caught": caught, "words": words}


def in_processes(work: list[tuple[Callable, object]], workers: int, fresh: bool = False) -> list[dict]:  # type: ignore[type-arg]
    """Results of function(argument). `fresh`: each in a process of its own, since a fault may cost the CUDA context."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=1 if fresh else None) as pool:
        waiting = [pool.submit(function, argument) for function, argument in work]
        for future in as_completed(waiting):
            if words := _unwell(future.result()):
                print(words, flush=True)
        return [future.result() for future in waiting]


def _unwell(row: dict) -> str:  # type: ignore[type-arg]
    """What is wrong with a result, in one line; nothing where all is well. Printed at once: a run can be cut short."""
    bad = row.get("outcome", "PASS") not in ("PASS", "UNSUPPORTED") or not row.get("caught", True)
    return json.dumps(row) if bad or not all(v for v in row.values() if isinstance(v, bool)) else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true", help="only run a few small layers (what the sanitizer watches)")
    parser.add_argument("--fault", default="", help="with --small: plant this fault")
    parser.add_argument("--workers", type=int, default=6)
    options = parser.parse_args()
    if options.small:
        small(options.fault)
        return 0
    if options.output is None:
        parser.error("name the results file")
    modes.choose("device")
    start = time.perf_counter()
    arch = toolkit.architecture(torch.device("cuda", 0))
    build_all([arch])
    record = results.origin("cuda", options.output) | {"build_seconds": round(time.perf_counter() - start, 1)}
    lines = cases()
    work: list[tuple[Callable, object]] = [(index_width, None)]  # type: ignore[type-arg]
    work += [(history, c.name) for c in candidates()]
    work += [(verify, (c.name, line)) for line in lines for c in candidates()]
    with ThreadPoolExecutor(len(TOOLS) + len(CONTROLS)) as pool:
        sanitizer = pool.map(sanitize, [*((tool, "") for tool in TOOLS), *CONTROLS])
        found = in_processes(work, options.workers)
        print(len(found), "verdicts and histories after", round(time.perf_counter() - start), "s", flush=True)
        caught = in_processes([(hunt, fault) for fault in faults.FAULTS], options.workers, fresh=True)
        tools = list(sanitizer)
    (wide, *kept), verdicts = found[: 1 + len(candidates())], found[1 + len(candidates()) :]
    bandwidth = copy_bandwidth()
    record |= {
        "nvcc": _compiler(),
        "verdicts": {o: sum(v["outcome"] == o for v in verdicts) for o in sorted({v["outcome"] for v in verdicts})},
        "history": kept,
        "index_width": wide,
        "faults": {"planted": len(caught), "caught": sum(bool(f["caught"]) for f in caught), "each": caught},
        "sanitizer": tools,
        "copy_bytes_per_second": round(bandwidth),
        "timings": timings(bandwidth),
        "each_verdict": verdicts,
        "seconds": round(time.perf_counter() - start, 1),
    }
    results.write(options.output, record)
    return 0 if _all_well(record) else 1


def _compiler() -> str:
    """nvcc's release."""
    words = subprocess.run([toolkit.nvcc() or "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", words)
    return release[1] if release else "unknown"


def _all_well(record: dict) -> bool:  # type: ignore[type-arg]
    """Print what matters, and say whether all is well."""
    wrong = [v for v in record["each_verdict"] if v["outcome"] not in ("PASS", "UNSUPPORTED")]
    missed = [f for f in record["faults"]["each"] if not f["caught"]]
    loud = [t for t in record["sanitizer"] if (t["errors"] != 0) != bool(t["fault"]) or t["errors"] is None]
    for row in (*record["history"], *record["timings"]):
        print(json.dumps(row))
    print(record["verdicts"], f"faults {record['faults']['caught']}/{record['faults']['planted']}", record["seconds"], "s")
    kept = all(record["index_width"].values()) and all(h["graph_replay"] and h["side_stream"] for h in record["history"])
    return not wrong and not missed and not loud and kept and bool(record["verdicts"].get("PASS"))


if __name__ == "__main__":
    sys.exit(main())
