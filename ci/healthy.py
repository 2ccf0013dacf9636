"""A campaign of random healthy cases: every installed candidate on each, and the verdicts counted. No alarm may come.

    python ci/healthy.py docs/results/healthy-cpu.json --cases 1000 [--start 0] [--mode interpret] [--jobs 2] [--candidates ..]

Writes how many stage tensors were judged, the share of its bound that each used, and every alarm with its replay line.
Exit code 0 where there is none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from moeproof.harness import modes, results, workers
from moeproof.harness.sample import sample
from moeproof.harness.verdict import Outcome, Verdict

GOOD = (Outcome.PASS, Outcome.UNSUPPORTED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--mode", default="auto")
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--candidates", nargs="*", default=[])
    options = parser.parse_args()
    begun = time.perf_counter()
    mode = workers.settle(options.mode)
    names = workers.resolve(options.candidates)
    work: workers.Work = [("", case) for case in sample(options.cases, options.start)]
    verdicts = list(workers.run(names, work, mode, options.jobs))
    record = results.origin(modes.default_device(), options.output) | {"mode": mode, "cases": options.cases}
    record |= summary(verdicts) | {"seconds": round(time.perf_counter() - begun, 1)}
    results.write(options.output, record)
    alarms = [v for v in verdicts if v.outcome not in GOOD]
    for verdict in alarms:
        print(verdict)
    print(f"{record['verdicts']}; {record['stage_checks']} stage tensors judged, {len(alarms)} alarms")
    return 1 if alarms else 0


def summary(verdicts: list[Verdict]) -> dict[str, object]:
    """Counts by candidate, and by tensor the largest and the median of the largest observed/allowed error of each case."""
    outcomes: dict[str, Counter[str]] = defaultdict(Counter)
    ratios: dict[str, list[float]] = defaultdict(list)
    for v in verdicts:
        outcomes[v.candidate][v.outcome.value] += 1
        for tensor, ratio in v.worst.items():
            ratios[tensor].append(ratio)
    spread = {t: {"largest": max(r), "median": sorted(r)[len(r) // 2], "of": len(r)} for t, r in ratios.items()}
    return {
        "verdicts": len(verdicts),
        "stage_checks": sum(len(v.worst) for v in verdicts),
        "facts_checked": sum(v.checked for v in verdicts),
        "alarms": [{"outcome": v.outcome.value, "text": str(v)} for v in verdicts if v.outcome not in GOOD],
        "by_candidate": {name: dict(counts) for name, counts in outcomes.items()},
        "observed_over_allowed": spread,
    }


if __name__ == "__main__":
    sys.exit(main())
