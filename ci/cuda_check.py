"""Everything about the CUDA stages that needs a GPU: build, timings, verdicts, planted faults, sanitizer.

    python ci/cuda_check.py docs/results/cuda-h100.json [--workers 12] [--seconds 600] [--thin 1] [--parts build timings ..]

Needs nvcc, compute-sanitizer and one NVIDIA GPU. Timings come first, while nobody else uses the GPU. Parts may run one by one,
and be cut short: each is written down when it ends, with the command that made it, and what the file holds of the same sources
on the same device stays; verdicts and faults go on where they ended. Exit code 0 when everything asked for was done, every
verdict is PASS, every fault is caught, and the sanitizer reports nothing but its controls.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

import cuda_jobs as jobs
import cuda_sanitizer as sanitizer
import deadlines
from cuda_jobs import faults
from cuda_timings import PEERS, copy_bandwidth, target, timings

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.presets import preset
from moeproof.harness.cases.sample import sample
from moeproof.harness.cases.tiers import cases_of, preset_cases
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.reports import results
from moeproof.optimized.cuda import batched, quant_stages, stages, toolkit
from moeproof.optimized.cuda.build import build_all
from moeproof.optimized.cuda.candidates import BATCHED_MIXES, MIXES, QUANT_MIXES, candidates

PARTS = ("build", "timings", "first", "verdicts", "faults", "sanitizer")
FIRST = (
    "T=9,H=104,I=72,E=4,K=2,seed=2",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_token",
    "T=9,H=104,I=72,E=4,K=2,layout=batched,capacity=18,seed=2",
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
BATCHED = (
    "capacity=66",
    "capacity=33,routing=minus1,act=swigluoai",
    "capacity=66,routing=hot,strided=1",
    "capacity=33,ep=2,values=hetero",
    "capacity=66,dtype=fp16,act=relu2_no_mul,routing=dup",
    "capacity=66,routing=empty,values=sat",
)
LONGEST = 45.0
"""Seconds for one job."""
SPREAD = 6
"""A run that is cut short has seen every sixth case, and then others."""


def cases() -> list[str]:
    """Case lines of the quick tier, of every preset as a scaled twin, of random layers, and two at full size."""
    chosen = [*cases_of("quick"), *(case for _, case in preset_cases(8)), *sample(24, 5000)]
    chosen += [parse_case(f"T=33,H=288,I=160,E=8,K=2,{line}") for line in QUANTISED]
    chosen += [parse_case(f"T=33,H=104,I=72,E=8,K=2,layout=batched,{line}") for line in BATCHED]
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
    regions = BATCHED_MIXES | {f"{jobs.TRITON}-batched": ()}, batched.SEAMS, "batched: "
    found: dict[str, dict[str, int]] = {}
    for mixes, pairs, prefix in (plain, quant, regions):
        passed = {name: sum(v["outcome"] == "PASS" for v in verdicts if v["candidate"] == name) for name in mixes}
        for pair in pairs[1:] if pairs is stages.SEAMS else pairs:  # the first is jobs.routed's
            row: dict[str, int] = {}
            for name, cuda in mixes.items():
                backends = ", ".join("cuda" if stage in cuda else "triton" for stage in pair)
                row[backends] = row.get(backends, 0) + passed[name]
            found[prefix + " > ".join(pair)] = row
    return found


def well(row: dict) -> bool:  # type: ignore[type-arg]
    """Whether a row of any part says what it should."""
    if "lost" in row:
        return deadlines.left(row)
    if "tool" in row:
        return sanitizer.well(row)
    passed = row.get("outcome") in (None, "PASS", "UNSUPPORTED")
    return passed and all(value for value in row.values() if isinstance(value, bool))


def sources() -> str:
    """SHA-256 of what the stages are made of: rows of other sources are no rows of these."""
    keys = [toolkit.key(stage, "") for stage in toolkit.STAGES]
    return hashlib.sha256("".join(keys).encode()).hexdigest()[:16]


class Check:
    """A run: its parts write into `record`."""

    def __init__(self, output: Path, workers: int, seconds: float, thin: int) -> None:
        self.output, self.workers, self.thin = output, workers, thin
        self.start = time.monotonic()
        self.until = self.start + seconds
        self.origin = results.origin("cuda", output)
        same = {"device": self.origin["device"], "versions": self.origin["versions"], "nvcc": _compiler(), "sources": sources()}
        before = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
        kept = {name: before[name] for name in PARTS if name in before} if same.items() <= before.items() else {}
        if before and not kept:
            print(f"'{output.name}' is of other sources, versions or another device: begun anew", flush=True)
        self.record: dict[str, object] = same | kept
        self.watching: list[Future[dict[str, object]]] = []

    @property
    def wrong(self) -> int:
        """Rows of all parts that are not well."""
        return sum(not well(row) for name in PARTS for row in self.rows(name))

    def rows(self, name: str) -> list[dict]:  # type: ignore[type-arg]
        """What the record holds of a part."""
        part = self.record.get(name, {})
        assert isinstance(part, dict)
        flat = [row.get("verdicts", [row]) for row in part.get("each", [])]
        return [row for rows in flat for row in rows]

    @property
    def left(self) -> int:
        """Jobs of all parts that there was no time for."""
        parts = [part for name in PARTS if isinstance(part := self.record.get(name), dict)]
        return sum(part.get("left", 0) for part in parts)

    def part(self, name: str) -> None:
        """Run one, keep what it found, and say how long it took."""
        begun = time.monotonic()
        found = getattr(self, name)() if begun < self.until else {"left": 1}
        found |= {"seconds": round(time.monotonic() - begun, 1), "command": self.origin["command"], "date": self.origin["date"]}
        self.record[name] = found
        results.write(self.output, self.record | {"wrong": self.wrong, "left": self.left})
        words = {key: value for key, value in found.items() if not isinstance(value, list)}
        print(f"== {name}: {time.monotonic() - begun:.0f} s, {json.dumps(words)}", flush=True)

    def run(self, work: list[deadlines.Job], until: float, fresh: bool = False) -> list[dict]:  # type: ignore[type-arg]
        return deadlines.run(work, self.workers, LONGEST, until, fresh, self.look)

    def look(self, row: dict) -> None:  # type: ignore[type-arg]
        """Say at once what is not well, since a run can be cut short."""
        for one in row.get("verdicts", [row]):
            if not well(one):
                print(json.dumps(one), flush=True)

    def build(self) -> dict[str, object]:
        arch = toolkit.architecture(torch.device("cuda", 0))
        made = build_all([arch])
        # Faulty libraries are compiled beside what comes next: it leaves cores idle while it waits for the GPU.
        work = [functools.partial(jobs.compile_fault, fault.name, arch) for fault in faults.FAULTS]
        threading.Thread(target=deadlines.run, args=(work, self.workers, 2 * LONGEST, self.until), daemon=True).start()
        return {"arch": arch, "libraries": len(made)}

    def timings(self) -> dict[str, object]:
        bandwidth, rows = copy_bandwidth(), []
        for row in timings(bandwidth, self.until):
            rows.append(row)
            print(json.dumps(row), flush=True)
        missed = [f"{row['stage']}, M={row['M']}" for row in rows if target(row) is False]
        slower = [f"{row['stage']}, M={row['M']}" for row in rows if row["us"] > row["triton_us"]]
        peers = [{"stage": s, "M": M, "us": us, "peer": who} for (s, M), (us, who) in PEERS.items()]
        facts: dict[str, object] = {"copy_bytes_per_second": round(bandwidth), "targets_missed": missed}
        return facts | {"slower_than_triton": slower, "peers": peers, "each": rows}

    def first(self) -> dict[str, object]:
        work: list[deadlines.Job] = [functools.partial(jobs.verify, line) for line in FIRST]
        work += [functools.partial(jobs.history, c.name) for c in candidates()]
        work += [functools.partial(jobs.routed, line) for line in ROUTED]
        work += [functools.partial(jobs.quantised, scheme) for scheme in jobs.COMPARED]
        work += [functools.partial(jobs.index_width, stage) for stage in jobs.strides.checks("cuda")]
        found = self.run(work, min(self.until, time.monotonic() + 60))
        return {"left": sum(map(deadlines.left, found)), "each": found}

    def verdicts(self) -> dict[str, object]:
        every = cases()[:: self.thin]
        lines = [line for start in range(SPREAD) for line in every[start::SPREAD]]
        kept = [row for row in self.rows("verdicts") if row.get("case") in lines]
        left = [line for line in lines if line not in {row["case"] for row in kept}]
        found = self.run([functools.partial(jobs.verify, line) for line in left], self.share(0.6))
        # What time did not suffice for is left to the next run.
        lost = [row for row in found if "lost" in row and not deadlines.left(row)]
        verdicts = kept + [v for row in found for v in row.get("verdicts", [])]
        counts = Counter(v["outcome"] for v in verdicts)
        return {
            "cases": len(lines),
            "left": sum(map(deadlines.left, found)),
            "cases_lost": len(lost),
            **dict(sorted(counts.items())),
            "seams": seams(verdicts),
            "each": verdicts + lost,
        }

    def faults(self) -> dict[str, object]:
        names = [fault.name for fault in faults.FAULTS if fault.judged]
        kept = [row for row in self.rows("faults") if row.get("fault") in names and row["caught"]]
        left = [name for name in names if name not in {row["fault"] for row in kept}]
        found = kept + self.run([functools.partial(jobs.hunt, name) for name in left], self.share(0.75), fresh=True)
        caught = sum(bool(f.get("caught")) for f in found)
        return {"planted": len(names), "caught": caught, "left": sum(map(deadlines.left, found)), "each": found}

    def watch(self) -> list[Future[dict[str, object]]]:
        """Begin with the sanitizer's tools: each takes one core and long, so they go beside other parts."""
        seconds, cases = self.until - time.monotonic() - 5, len(sanitizer.CASES[:: self.thin])
        pool = ThreadPoolExecutor(len(sanitizer.WATCHED))
        return [pool.submit(sanitizer.sanitize, *job, cases, seconds) for job in sanitizer.WATCHED]

    def sanitizer(self) -> dict[str, object]:
        found = [future.result() for future in self.watching or self.watch()]
        for row in found:
            self.look(row)
        return {"clean": sum(r["errors"] == 0 for r in found if not r["fault"]), "each": found}

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
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=600, help="for all parts together")
    parser.add_argument("--thin", type=int, default=1, help="take every n-th case only")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    modes.choose("device")
    check = Check(options.output, options.workers, options.seconds, options.thin)
    for name in options.parts:
        if name in ("first", "verdicts") and "sanitizer" in options.parts and not check.watching:
            check.watching = check.watch()
        check.part(name)
    print(f"{check.wrong} not well, {check.left} left, {time.monotonic() - check.start:.0f} s", flush=True)
    return 1 if check.wrong or check.left else 0


if __name__ == "__main__":
    sys.exit(main())
