"""Everything about the CUDA stages that needs a GPU, in one command: build, verdicts, planted faults, sanitizer, timings.

    python ci/cuda_check.py docs/results/cuda-h100.json [--workers 6] [--seconds 600] [--thin 1]

Needs nvcc, compute-sanitizer and one NVIDIA GPU. Parts come in the order in which they teach most; each is written down when
it ends, so that a run that is cut short loses no more than its last part. Exit code 0 when everything asked for was done,
every verdict is PASS, every fault is caught, and the sanitizer reports nothing but its controls.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_jobs as jobs
import cuda_sanitizer as sanitizer
import deadlines
from cuda_jobs import faults
from cuda_timings import copy_bandwidth, timings

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.presets import preset
from moeproof.harness.cases.sample import sample
from moeproof.harness.cases.tiers import cases_of, preset_cases
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.reports import results
from moeproof.optimized.cuda import quant_stages, stages, toolkit
from moeproof.optimized.cuda.build import build_all
from moeproof.optimized.cuda.candidates import MIXES, QUANT_MIXES, candidates

PARTS = ("build", "first", "verdicts", "faults", "sanitizer", "timings")
FIRST = (
    "T=9,H=104,I=72,E=4,K=2,seed=2",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_token",
)
"""A small case for each candidate, before anything longer."""
ROUTED = (
    "T=1024,H=8,I=8,E=128,K=8,router=softmax:renorm=sum",
    "T=2000,H=8,I=8,E=60,K=6,router=sigmoid:bias:groups=4/2:top2:renorm=sum,logits=ties",
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
    "scheme=fp8_token,act=swigluoai,routing=minus1,strided=1",
    "scheme=fp8_token,routing=empty,ep=2,values=hetero",
    "scheme=fp8_token,shared=32,act=relu2_no_mul,routing=hot",
    "scheme=mxfp4_w4a4_up,dtype=fp16,act=relu2_no_mul",
)
LONGEST = 45.0
"""Seconds for one job."""


def cases() -> list[str]:
    """Case lines of the quick tier, of every preset as a scaled twin, of random layers, and two at full size."""
    chosen = [*cases_of("quick"), *(case for _, case in preset_cases(8)), *sample(24, 5000)]
    chosen += [parse_case(f"T=33,H=288,I=160,E=8,K=2,{line}") for line in QUANTISED]
    # The healthy twins of the planted faults.
    chosen += [parse_case(fault.case) for fault in faults.FAULTS if fault.case != faults.WIDE]
    chosen += [Case(replace(preset("qwen3-30b-a3b"), T=t)) for t in (1, 2048)]
    lines = list(dict.fromkeys(str(case) for case in chosen))
    return [
        line for line in lines if any(c.supports(parse_case(line).problem) is None for c in map(as_candidate, candidates()))
    ]


def seams(verdicts: list[dict]) -> dict[str, dict[str, int]]:  # type: ignore[type-arg]
    """Passed verdicts of every pair of backends at every seam: the matrix of who hands tensors to whom."""
    plain = MIXES | {jobs.TRITON: ()}, stages.SEAMS, ""
    quant = QUANT_MIXES | {f"{jobs.TRITON}-quant": ()}, quant_stages.SEAMS, "quantised: "
    found: dict[str, dict[str, int]] = {}
    for mixes, pairs, prefix in (plain, quant):
        passed = {name: sum(v["outcome"] == "PASS" for v in verdicts if v["candidate"] == name) for name in mixes}
        for pair in pairs[1:] if pairs is stages.SEAMS else pairs:  # the first is jobs.routed's
            row: dict[str, int] = {}
            for name, cuda in mixes.items():
                backends = ", ".join("cuda" if stage in cuda else "triton" for stage in pair)
                row[backends] = row.get(backends, 0) + passed[name]
            found[prefix + " > ".join(pair)] = row
    return found


class Check:
    """A run: its parts write into `record`, and whatever is not well into `wrong`."""

    def __init__(self, output: Path, workers: int, seconds: float, thin: int) -> None:
        self.output, self.workers, self.thin = output, workers, thin
        self.start = time.monotonic()
        self.until = self.start + seconds
        self.record: dict[str, object] = results.origin("cuda", output) | {"nvcc": _compiler()}
        self.wrong: list[dict] = []  # type: ignore[type-arg]
        self.watching: list[Future[dict[str, object]]] = []

    def part(self, name: str) -> None:
        """Run one, keep what it found, and say how long it took."""
        begun = time.monotonic()
        found = getattr(self, name)() if begun < self.until else deadlines.lost("not begun: the time was up")
        if found.get("lost"):
            self.note(found | {"part": name})
        self.record[name] = found | {"seconds": round(time.monotonic() - begun, 1)}
        results.write(self.output, self.record | {"wrong": len(self.wrong)})
        words = {key: value for key, value in found.items() if not isinstance(value, list)}
        print(f"== {name}: {time.monotonic() - begun:.0f} s, {json.dumps(words)}", flush=True)

    def note(self, row: dict) -> None:  # type: ignore[type-arg]
        """Something is not well: say so at once, since a run can be cut short."""
        self.wrong.append(row)
        print(json.dumps(row), flush=True)

    def run(self, work: list[deadlines.Job], until: float, fresh: bool = False) -> list[dict]:  # type: ignore[type-arg]
        return deadlines.run(work, self.workers, LONGEST, until, fresh, self.look)

    def look(self, row: dict) -> None:  # type: ignore[type-arg]
        for one in row.get("verdicts", [row]):
            failed = one.get("outcome") not in (None, "PASS", "UNSUPPORTED")
            if "lost" in one or failed or not all(value for value in one.values() if isinstance(value, bool)):
                self.note(one)

    def build(self) -> dict[str, object]:
        arch = toolkit.architecture(torch.device("cuda", 0))
        made = build_all([arch])
        # Faulty libraries are compiled beside the verdicts, which leave cores idle while they wait for the GPU.
        work = [functools.partial(jobs.compile_fault, fault.name, arch) for fault in faults.FAULTS]
        threading.Thread(target=deadlines.run, args=(work, 8, 2 * LONGEST, self.until), daemon=True).start()
        return {"arch": arch, "libraries": len(made)}

    def first(self) -> dict[str, object]:
        work: list[deadlines.Job] = [functools.partial(jobs.verify, line) for line in FIRST]
        work += [functools.partial(jobs.history, c.name) for c in candidates()]
        work += [functools.partial(jobs.routed, line) for line in ROUTED]
        work += [functools.partial(jobs.index_width, stage) for stage in jobs.strides.checks("cuda")]
        return {"each": self.run(work, min(self.until, time.monotonic() + 60))}

    def verdicts(self) -> dict[str, object]:
        lines = cases()[:: self.thin]
        found = self.run([functools.partial(jobs.verify, line) for line in lines], self.share(0.45))
        verdicts = [v for row in found for v in row.get("verdicts", [])]
        outcomes = sorted({v["outcome"] for v in verdicts})
        counts = {name: sum(v["outcome"] == name for v in verdicts) for name in outcomes}
        lost = sum("lost" in row for row in found)
        return {"cases": len(lines), "lost": lost} | counts | {"seams": seams(verdicts), "each": verdicts}

    def faults(self) -> dict[str, object]:
        work = [functools.partial(jobs.hunt, fault.name) for fault in faults.FAULTS if fault.judged]
        found = self.run(work, self.share(0.55), fresh=True)
        return {"planted": len(found), "caught": sum(bool(f.get("caught")) for f in found), "each": found}

    def watch(self) -> list[Future[dict[str, object]]]:
        """Begin with the sanitizer's tools: each takes one core and long, so they go beside other parts."""
        seconds, cases = self.share(0.8) - time.monotonic(), len(sanitizer.CASES[:: self.thin])
        pool = ThreadPoolExecutor(len(sanitizer.WATCHED))
        return [pool.submit(sanitizer.sanitize, *job, cases, seconds) for job in sanitizer.WATCHED]

    def sanitizer(self) -> dict[str, object]:
        found = [future.result() for future in self.watching or self.watch()]
        for row in found:
            if not sanitizer.well(row):
                self.note(row)
        return {"clean": sum(r["errors"] == 0 for r in found if not r["fault"]), "each": found}

    def timings(self) -> dict[str, object]:
        bandwidth = copy_bandwidth()
        rows = []
        for row in timings(bandwidth, self.until):
            rows.append(row)
            print(json.dumps(row), flush=True)
        return {"copy_bytes_per_second": round(bandwidth), "each": rows}

    def share(self, part: float) -> float:
        """The time by which this part of what is left will be gone."""
        now = time.monotonic()
        return now + part * (self.until - now)


def _compiler() -> str:
    """nvcc's release."""
    words = subprocess.run([toolkit.nvcc() or "nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\S+),", words)
    return release[1] if release else "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, help="the results file")
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together")
    parser.add_argument("--thin", type=int, default=1, help="take every n-th case only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    modes.choose("device")
    check = Check(options.output, options.workers, options.seconds, options.thin)
    for name in options.parts:
        if name == "verdicts" and "sanitizer" in options.parts:
            check.watching = check.watch()
        check.part(name)
    print(f"{len(check.wrong)} not well, {time.monotonic() - check.start:.0f} s", flush=True)
    return 1 if check.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
