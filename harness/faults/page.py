"""What `moeproof faults` prints and writes: lines for people, JSON for programs, results/faults-cpu.json and faults.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from moeproof.harness.faults import gpu_report, markdown
from moeproof.harness.faults.campaign import Campaign
from moeproof.harness.faults.hunt import Hunt
from moeproof.harness.faults.nulls import Taken
from moeproof.harness.faults.shrunk import Small
from moeproof.harness.faults.side_by_side import Row
from moeproof.harness.reports import results
from moeproof.harness.reports.report import console, print_json


def record(found: Hunt | Small) -> dict[str, object]:
    return asdict(found) | {"seconds": round(found.seconds, 2), "cpu_seconds": round(found.cpu_seconds, 2)}


def taken(row: Row) -> Taken:
    """A suite's line in the table of null kernels."""
    return Taken(row.name, 1, row.nulls)


def line(hunts: Sequence[Hunt], json: bool) -> None:
    """Each result as it comes."""
    for h in hunts:
        if json:
            print_json(record(h))
        else:
            console(json).print(_line(h), markup=False)


def _line(h: Hunt) -> str:
    name = h.label + (f" p={h.chance:g}" if h.chance < 1 else "")
    if not h.caught:
        return f"{name}: {'not caught' if h.triggered else 'not triggered'} so far ({h.seconds:.1f} s)"
    after = f"{h.needed} calls" if h.chance < 1 else f"case {h.needed}"
    stage = "" if h.right_stage else " WRONG STAGE"
    place = " WRONG PLACE" if h.place is False else ""
    return f"{name}: caught after {after}{stage}{place}: {h.finding}"


def small(s: Small, json: bool) -> None:
    if json:
        print_json({"shrunk": s.id} | record(s))
    else:
        words = s.error or f"{s.tokens} tokens after {s.runs} runs, {s.seconds:.1f} s: {s.case}"
        console(json).print(f"{s.id} shrinks to {words}", markup=False)


def show(campaign: Campaign, json: bool) -> None:
    """Alarms, what is not planted, rules, and the summary last."""
    out = console(json)
    for alarm in [*campaign.well.alarms, *(a for h in campaign.hunts for a in h.twin_alarms)]:
        out.print(f"FALSE ALARM {alarm}", markup=False, style="bold red")
    for fault in campaign.chosen:
        if not fault.planted:
            out.print(f"{fault.id} {fault.name}: not planted: {fault.why_not}", markup=False, style="dim")
    for title, rows in (("on our inputs", campaign.ours), ("on their own recipes", campaign.theirs)):
        if rows:
            out.print("\n".join(_rules(title, rows)), markup=False)
        if json:
            for row in rows:
                print_json({"rows": title, **asdict(row)})
    for title, figures in (("default tier", campaign.default_tier), ("shrinking", campaign.shrinking)):
        out.print(f"{title}: " + ", ".join(f"{k} {v}" for k, v in figures.items()), markup=False)
    if json:
        print_json(campaign.summary)
    else:
        out.print(", ".join(f"{k} {v}" for k, v in campaign.summary.items()), markup=False)


def _rules(title: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"{title}: faults that each rule lets through"]
    for r in rows:
        blind = f"; null kernels accepted: {', '.join(r.nulls)}" if r.nulls else ""
        health = f"; false alarms: {r.false_alarms}" if r.false_alarms else ""
        lines.append(f"  {r.name}: {r.faults - r.rejected} of {r.faults} pass{blind}{health}")
    return lines


def write(folder: Path, campaign: Campaign) -> None:
    """FOLDER/results/faults-cpu.json and FOLDER/faults.md."""
    content = results.origin("cpu", folder) | {
        "summary": campaign.summary,
        "plantings": campaign.plantings,
        "default_tier": campaign.default_tier,
        "shrinking": campaign.shrinking,
        "vacuous_cases": campaign.well.vacuous,
        "on_gpu": {f.id: list(f.on_gpu) for f in campaign.chosen if f.on_gpu},
        "not_planted": {f.id: f.why_not for f in campaign.chosen if not f.planted},
        "hunts": [record(h) for h in campaign.hunts],
        "shrunk": [
            asdict(s) | {"seconds": round(s.seconds, 2), "cpu_seconds": round(s.cpu_seconds, 2)} for s in campaign.smalls
        ],
        "our_inputs": [asdict(r) for r in campaign.ours],
        "their_recipes": [asdict(r) for r in campaign.theirs],
        "null_kernels": [asdict(t) for t in campaign.nulls],
    }
    results.write(folder / "results" / "faults-cpu.json", content)
    environment = f"python {platform.python_version()}, torch {torch.__version__}, cpu ({platform.machine()})"
    (folder / "faults.md").write_text(markdown.page(campaign, environment, gpu_report.section(folder)), encoding="utf-8")
