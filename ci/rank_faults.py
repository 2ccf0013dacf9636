"""Planted faults of several ranks over one transport: caught, on which stage, with the right rank named, after how long.

    python ci/rank_faults.py [--transport gloo] [--ranks 3] [--deadline 5] [--output docs/results/rank-faults-gloo.json]

Each class is judged once with its fault and once as its twin, which must pass. Exit code 0 where all were caught on their
stage with a right rank, no twin alarmed, and what hangs ended within deadline + 2 s. tests/ranks/test_rank_fault_table.py
runs all of it over simulated ranks, and the hangs over processes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.on_ranks import FAULTS, HERE, SIZES, RankFault
from moeproof.harness.ranks import command
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.registry import load_rank_pairs
from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome, Verdict

MARGIN = 2.0
"""Seconds after the deadline in which a hang must have ended."""


def line_of(fault: RankFault, ranks: int, layout: str) -> str:
    """The case that triggers it."""
    options = {"layout": layout, "values": "sat", "ranks": str(ranks), "seed": "5"}
    for extra in (SIZES, fault.line):
        options |= dict(part.split("=", 1) for part in extra.split(",") if part)
    return ",".join(f"{key}={value}" for key, value in options.items())


def hunt(fault: RankFault, session: RankSession) -> dict[str, Any]:
    """One class, as a row of the table."""
    wrong, twin = load_rank_pairs([f"{HERE}:{fault.name}", f"{HERE}:{fault.name}_twin"])
    case = parse_case(line_of(fault, session.ranks, wrong.layout))
    calm = session.judge(twin.source, twin, case)
    if calm.outcome is Outcome.UNSUPPORTED is not fault.twin:
        return {"class": fault.name, "what": fault.what, "not_run": calm.reason}
    start = time.monotonic()
    verdict = session.judge(wrong.source, wrong, case)
    seconds = time.monotonic() - start
    after = session.judge(twin.source, twin, case) if fault.hangs else calm
    return {
        "class": fault.name,
        "what": fault.what,
        "pair": fault.pair,
        "case": str(case),
        "caught": verdict.outcome in fault.outcomes,
        "outcome": str(verdict.outcome),
        "right_stage": fault.hangs or _stage(verdict) == fault.stage or verdict.outcome is Outcome.ERROR,
        "rank": verdict.rank,
        "right_rank": bool(named(verdict) & set(fault.ranks(case.world))),
        "seconds": round(seconds, 3),
        "in_time": not fault.hangs or seconds < session.deadline + MARGIN,
        "twin": str(calm.outcome),
        "twin_right": calm.outcome is after.outcome is fault.twin,
        "words": str(verdict.findings[0]) if verdict.findings else verdict.reason.split("\n")[0],
    }


def named(verdict: Verdict) -> set[int | None]:
    """Ranks that the verdict says to look at: its own, and those that its first line names as the cause."""
    words = verdict.reason.split("\n")[0]
    found = re.findall(r"ranks \[(\d+)\] declared|\brank (\d+) (?:refused|has)\b|rows of rank (\d+)", words)
    return {verdict.rank} | {int(n) for groups in found for n in groups if n}


def _stage(verdict: Verdict) -> object:
    return verdict.findings[0].stage if verdict.findings else None


def right(row: dict[str, Any]) -> bool:
    """Whether a row is what it must be. What a transport cannot run is not wrong."""
    if "not_run" in row:
        return True
    return all(bool(row[key]) for key in ("caught", "right_stage", "right_rank", "in_time", "twin_right"))


def table(faults: Sequence[RankFault], ranks: int, transport: str, deadline: float) -> Iterator[dict[str, Any]]:
    """Row by row. Classes that need another number of ranks than `ranks` get a session of their own."""
    sessions: dict[int, RankSession] = {}
    try:
        for fault in faults:
            wanted = max([ranks, *(int(p.split("=")[1]) for p in fault.line.split(",") if p.startswith("ranks="))])
            if (fault.processes_only and transport == "simulated") or (fault.cpu_only and transport in ("symm", "nccl")):
                why = "threads cannot be ended" if transport == "simulated" else "the reference cannot be captured"
                yield {"class": fault.name, "what": fault.what, "not_run": why}
                continue
            if wanted not in sessions:
                sessions[wanted] = RankSession(wanted, transport, deadline)
            yield hunt(fault, sessions[wanted])
    finally:
        for session in sessions.values():
            session.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transport", default="gloo")
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=5.0)
    parser.add_argument("--only", action="append", default=[], help="class (may be repeated)")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    command.settle(options.transport, "auto")
    device = "cpu" if options.transport in ("simulated", "gloo") else "cuda"
    record: dict[str, Any] = results.origin(device, options.output)
    start = time.monotonic()
    rows = []
    chosen = [f for f in FAULTS if not options.only or f.name in options.only]
    for row in table(chosen, options.ranks, options.transport, options.deadline):
        rows.append(row)
        state = "not run" if "not_run" in row else "right" if right(row) else "WRONG"
        brief = [row.get(key, "") for key in ("class", "outcome", "rank", "seconds", "twin", "words", "not_run")]
        print(f"{state:>7} {' '.join(map(str, brief))}"[:230], file=sys.stderr, flush=True)
    run = [row for row in rows if "not_run" not in row]
    record |= {
        "transport": options.transport,
        "ranks": options.ranks,
        "deadline_s": options.deadline,
        "planted": len(run),
        "right": sum(map(right, run)),
        "twins_alarmed": sum(not row["twin_right"] for row in run),
        "longest_hang_s": max((row["seconds"] for row in run if row["outcome"] == "TIMEOUT"), default=0.0),
        "classes": rows,
        "seconds": round(time.monotonic() - start, 1),
    }
    print(json.dumps({k: v for k, v in record.items() if k != "classes"}, indent=1))
    if options.output:
        results.write(options.output, record)
    return 0 if run and all(map(right, rows)) else 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
