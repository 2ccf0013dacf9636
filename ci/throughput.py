"""How many cases a second: the oracle alone, torch candidates, interpreted and compiled Triton. A benchmark, not a test.

    python ci/throughput.py [--output docs/results/throughput.json]

Figures are wall time of one process with one torch thread, on the quick tier's cases; they say what a tier costs here,
nothing about a kernel's speed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness import modes
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import find_candidates
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Claims
from moeproof.reference.oracle import chain, route


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--mode", default="auto")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mode = modes.choose(options.mode)
    device = modes.default_device()
    cases = cases_of("quick")
    rows = {"oracle (inputs, route and chain)": _oracle(cases, device)}
    for candidate in find_candidates():
        times = []
        for case in cases:
            start = time.perf_counter()
            verdict = judge(candidate, case, device)
            if verdict.outcome is not Outcome.UNSUPPORTED:
                times.append(time.perf_counter() - start)
        if times:
            rows[f"{candidate.name} ({mode if candidate.backend == 'triton' else 'torch'})"] = times
    record = results.origin(device, options.output) | {
        "load_average": os.getloadavg()[0],
        "cases_per_second": {name: round(len(t) / sum(t), 2) for name, t in rows.items()},
        "median_ms": {name: round(1e3 * statistics.median(t), 1) for name, t in rows.items()},
    }
    print(json.dumps(record, indent=1))
    if options.output:
        results.write(options.output, record)
    return 0


def _oracle(cases: list, device: str) -> list[float]:  # type: ignore[type-arg]
    times = []
    for case in cases:
        start = time.perf_counter()
        inputs = make_inputs(case, device)
        chain(inputs, Claims())
        route(inputs)
        times.append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(main())
