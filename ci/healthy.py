"""Healthy campaign: our candidates over many cases, in which any alarm is a false one. Writes one results file.

    python ci/healthy.py docs/results/healthy-cpu.json --parts cover sweep random --count 1000
    python ci/healthy.py docs/results/healthy-h100.json --parts cover sweep random histories huge --count 1000 --mode device

Parts: `cover` every pair of values of two axes; `sweep` every 16-bit gate; `random` --count random cases; `histories` side
stream and CUDA-graph replay (GPU); `huge` offsets beyond 2^31 elements (GPU, 60 GB, a minute). A stage check is one tensor
of one case judged against its bound. Exit code 0 when nothing alarmed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness import modes
from moeproof.harness.axes import covering
from moeproof.harness.case import Case, parse_case
from moeproof.harness.judge import judge
from moeproof.harness.registry import find_candidates, load_candidates
from moeproof.harness.sample import sample
from moeproof.harness.tiers import cases_of, sweep_cases
from moeproof.harness.verdict import Outcome, Verdict

GOOD = (Outcome.PASS, Outcome.UNSUPPORTED)
HUGE = (
    "T=5,H=512,I=256,E=3,K=2,huge=1,seed=1",
    "T=33,H=128,I=64,E=8,K=2,dtype=fp16,huge=1,values=tagged,seed=2",
    "T=3,H=256,I=128,E=2,K=1,huge=1,values=int,layout=batched,seed=3",
)


def histories() -> Iterator[Case]:
    """The quick tier and both layouts of a larger layer, on a side stream and in a captured graph."""
    larger = [parse_case(f"T=64,H=512,I=256,E=16,K=4,layout={layout},seed=7") for layout in ("standard", "batched")]
    for case in [*cases_of("quick"), *larger]:
        for history in ("stream", "graph"):
            yield replace(case, history=history)


def part(name: str, count: int, start: int) -> Iterator[Case]:
    parts = {
        "cover": lambda: iter(covering()),
        "sweep": lambda: iter(sweep_cases()),
        "random": lambda: sample(count, start),
        "histories": histories,
        "huge": lambda: map(parse_case, HUGE),
    }
    return parts[name]()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", nargs="+", default=["cover", "sweep", "random"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--start", type=int, default=100_000)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--candidates", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=0.0, help="stop after this long; 0 = never")
    options = parser.parse_args()
    torch.set_num_threads(1)
    modes.choose(options.mode)
    candidates = load_candidates(options.candidates) if options.candidates else find_candidates()
    begin, parts, alarms = time.perf_counter(), {}, []
    for name in options.parts:
        outcomes: Counter[str] = Counter()
        checks = facts = cases = 0
        start = time.perf_counter()
        reasons: Counter[str] = Counter()
        for case in part(name, options.count, options.start):
            if options.seconds and time.perf_counter() - begin > options.seconds:
                break
            cases += 1
            for candidate in candidates:
                verdict: Verdict = judge(candidate, case)
                outcomes[verdict.outcome.value] += 1
                checks += len(verdict.worst) if verdict.outcome is Outcome.PASS else 0
                facts += verdict.checked
                if verdict.outcome is Outcome.UNSUPPORTED and name == "histories":
                    reasons[f"{candidate.name}: {verdict.reason[:120]}"] += 1
                if verdict.outcome not in GOOD:
                    alarms.append(str(verdict))
                    print(verdict, flush=True)
            if torch.cuda.is_available() and name == "huge":
                torch.cuda.empty_cache()
        seconds = time.perf_counter() - start
        parts[name] = {"cases": cases, "stage_checks": checks, "facts": facts, "seconds": round(seconds, 1), **outcomes}
        if reasons:
            parts[name]["reasons"] = dict(reasons)
        print(name, parts[name], flush=True)
    record = {
        "command": "python " + " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if modes.default_device() == "cuda" else f"cpu, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "date": time.strftime("%Y-%m-%d"),
        "candidates": [c.name for c in candidates],
        "stage_checks": sum(int(str(p["stage_checks"])) for p in parts.values()),
        "alarms": len(alarms),
        "parts": parts,
        "alarm_texts": alarms,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
