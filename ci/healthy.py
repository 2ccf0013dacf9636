"""Healthy campaign: the installed candidates over many cases, in which any alarm is a false one. Writes one results file.

    python ci/healthy.py docs/results/healthy-cpu.json --parts cover sweep random --cases 1000 [--jobs 2]
    python ci/healthy.py docs/results/healthy-h100.json --parts cover sweep random histories huge --mode device [--jobs 8]

Parts: `cover` every pair of values of two axes; `sweep` every 16-bit gate; `random` --cases random cases; `histories` side
stream and CUDA-graph replay (GPU); `huge` offsets beyond 2^31 elements (GPU, 60 GB, a minute; give it --jobs 1). A stage check
is one tensor of one case judged against its bound. Exit code 0 when nothing alarmed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from moeproof.harness import modes, workers
from moeproof.harness.cases.axes import covering
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.sample import sample
from moeproof.harness.cases.tiers import cases_of, sweep_cases
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome, Verdict

GOOD = (Outcome.PASS, Outcome.UNSUPPORTED)
HUGE = (
    "T=5,H=512,I=256,E=3,K=2,huge=1,seed=1",
    "T=33,H=128,I=64,E=8,K=2,dtype=fp16,huge=1,values=tagged,seed=2",
    "T=3,H=256,I=128,E=2,K=1,huge=1,values=int,layout=batched,seed=3",
)
PARTS = ("cover", "sweep", "random", "histories", "huge")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cover", "sweep", "random"])
    parser.add_argument("--cases", type=int, default=1000, help="random cases")
    parser.add_argument("--start", type=int, default=100_000, help="seed of the first random case")
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--candidates", nargs="*", default=[])
    parser.add_argument("--seconds", type=float, default=0.0, help="start no case after this long; 0 = no limit")
    options = parser.parse_args()
    mode = workers.settle(options.mode)
    names = workers.resolve(options.candidates)
    begun = time.perf_counter()
    parts: dict[str, object] = {}
    verdicts: list[Verdict] = []
    for name in options.parts:
        work: workers.Work = [("", case) for case in cases_in(name, options.cases, options.start)]
        start, found = time.perf_counter(), []
        for verdict in workers.run(names, work, mode, options.jobs):
            found.append(verdict)
            if options.seconds and time.perf_counter() - begun > options.seconds:
                break
        parts[name] = counts(found) | {"seconds": round(time.perf_counter() - start, 1)}
        print(name, parts[name], flush=True)
        verdicts += found
    alarms = [str(v) for v in verdicts if v.outcome not in GOOD]
    record = results.origin(modes.default_device(), options.output) | {"mode": mode, "alarms": len(alarms)}
    results.write(options.output, record | summary(verdicts) | {"parts": parts, "alarm_texts": alarms})
    print("\n".join([*alarms, f"{len(alarms)} alarms"]))
    return 1 if alarms else 0


def cases_in(part: str, count: int, start: int) -> Iterator[Case]:
    """The cases of a part of the campaign."""
    if part == "random":
        yield from sample(count, start)
    elif part == "histories":
        yield from histories()
    elif part == "huge":
        yield from map(parse_case, HUGE)
    else:
        yield from covering() if part == "cover" else sweep_cases()


def histories() -> Iterator[Case]:
    """The quick tier and both layouts of a larger layer, on a side stream and in a captured graph."""
    larger = [parse_case(f"T=64,H=512,I=256,E=16,K=4,layout={layout},seed=7") for layout in ("standard", "batched")]
    for case in [*cases_of("quick"), *larger]:
        for history in ("stream", "graph"):
            yield replace(case, history=history)


def counts(verdicts: list[Verdict]) -> dict[str, object]:
    """Verdicts by outcome, stage checks of those that passed, and facts compared."""
    outcomes = Counter(v.outcome.value for v in verdicts)
    checks = sum(len(v.worst) for v in verdicts if v.outcome is Outcome.PASS)
    cases = len({str(v.case) for v in verdicts})
    return {"cases": cases, "stage_checks": checks, "facts": sum(v.checked for v in verdicts), **outcomes}


def summary(verdicts: list[Verdict]) -> dict[str, object]:
    """Counts by candidate, and by tensor the largest and the median of the largest observed/allowed error of each case."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    ratios: dict[str, list[float]] = defaultdict(list)
    for v in verdicts:
        outcomes[v.candidate][v.outcome.value] += 1
        for tensor, ratio in v.worst.items():
            ratios[tensor].append(ratio)
    spread = {t: {"largest": max(r), "median": sorted(r)[len(r) // 2], "of": len(r)} for t, r in ratios.items()}
    by_candidate = {name: dict(found) for name, found in outcomes.items()}
    return counts(verdicts) | {"by_candidate": by_candidate, "observed_over_allowed": spread}


if __name__ == "__main__":
    sys.exit(main())
