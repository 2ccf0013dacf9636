"""What `moeproof bench` prints and writes: a table, JSON lines, one results file, and a plot."""

from __future__ import annotations

import json as jsonlib
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from moeproof.harness import modes
from moeproof.harness.reports import results
from moeproof.harness.timing import bench
from moeproof.harness.timing.bench import Peers, Reading

ON_A_CPU = (
    "These are wall times of interpreted or eager calls at small sizes. They show that candidates run and agree with the "
    "oracle; they say nothing about a kernel's speed, and there is no roof to hold them against."
)


def collect(readings: Iterator[Reading], json: bool) -> list[Reading]:
    """With `json`, each reading is a line on standard output as it comes; else progress on standard error."""
    found = []
    for reading in readings:
        found.append(reading)
        if json:
            sys.stdout.write(jsonlib.dumps(reading.record()) + "\n")
            sys.stdout.flush()
        else:
            time_or_why = reading.reason or f"{reading.us:.1f} us"
            Console(stderr=True, highlight=False).print(
                f"{reading.model} M={reading.M} {reading.routing} {reading.candidate}: {time_or_why}", markup=False
            )
    return found


def summary(readings: Sequence[Reading], peers: Peers, device: str) -> dict[str, object]:
    """The last line of --json."""
    wrong = sum(r.reason.startswith("wrong") for r in readings)
    return {
        "points": len(readings),
        "timed": sum(r.us == r.us for r in readings),
        "wrong": wrong,
        "geomean_vs": bench.geomean_vs(readings, peers),
        "geomean_between": bench.geomean_between(readings),
        "below": below(readings, peers),
        "environment": modes.environment("triton", device),
    }


def below(readings: Sequence[Reading], peers: Peers, limit: float = 0.95) -> dict[str, list[str]]:
    """Candidate -> points where the best peer's time / its own is under the limit, worst first."""
    found: dict[str, list[tuple[float, str]]] = {}
    for r in readings:
        best = peers.get((r.kind, r.model, r.routing, r.M), {}).get("best")
        if best and r.us == r.us and best / r.us < limit:
            found.setdefault(r.candidate, []).append((best / r.us, f"{r.model} M={r.M} {r.routing} {best / r.us:.3f}"))
    return {c: [text for _, text in sorted(points)] for c, points in found.items()}


def table(readings: Sequence[Reading], peers: Peers) -> Table:
    shown = Table(*("model", "M", "routing", "candidate", "us", "spread", "TFLOP/s", "GB/s", "of roof", "eager us", "vs best"))
    for r in readings:
        best = peers.get((r.kind, r.model, r.routing, r.M), {}).get("best", math.nan)
        if r.reason:
            shown.add_row(r.model, str(r.M), r.routing, r.candidate, r.reason[:60])
            continue
        shown.add_row(
            *(r.model, str(r.M), r.routing, r.candidate, f"{r.us:.1f}", f"{r.us_min:.1f}-{r.us_max:.1f}"),
            *(f"{r.tflops:.0f}", f"{r.gbs:.0f}", f"{r.fraction_of_roof:.2f}", f"{r.eager_us:.0f}", f"{best / r.us:.3f}"),
        )
    return shown


def write(path: Path, readings: Sequence[Reading], last: dict[str, object], device: str) -> None:
    """All readings and the summary as one file, atomically."""
    results.write(path, results.origin(device, path) | last | {"readings": [r.record() for r in readings]})


def main(readings: Iterator[Reading], peers: Peers, device: str, json: bool, output: Path | None, plot: Path | None) -> int:
    """Exit code: 0 all right, 1 a candidate was wrong somewhere, 3 nothing was timed."""
    found = collect(readings, json)
    last = summary(found, peers, device)
    console = Console(stderr=json, highlight=False, width=160)
    console.print(table(found, peers))
    if device != "cuda":
        console.print(ON_A_CPU)
    for candidate, against in {**bench.geomean_vs(found, peers)}.items():
        console.print(f"{candidate}: geometric mean of peer's time / its own: {against}", markup=False)
    if json:
        sys.stdout.write(jsonlib.dumps(last) + "\n")
    if output:
        write(output, found, last, device)
    if plot:
        from moeproof.harness.timing import plot as bench_plot

        bench_plot.draw(found, peers, plot)
    if last["wrong"]:
        return 1
    return 0 if last["timed"] else 3
