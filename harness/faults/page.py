"""What `moeproof faults` prints and writes: a table for people, JSON lines for programs, docs/faults.md."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from moeproof.harness.faults.fault import GROUNDS, Fault
from moeproof.harness.faults.healthy import Healthy
from moeproof.harness.faults.run import Hunt
from moeproof.harness.faults.side_by_side import Row
from moeproof.harness.reports import results
from moeproof.harness.reports.report import console, print_json


def of_class(fault: Fault, hunts: Sequence[Hunt]) -> list[Hunt]:
    return [h for h in hunts if h.id == fault.id]


def verdict_of(fault: Fault, hunts: Sequence[Hunt]) -> dict[str, bool]:
    """A class holds where all its variants (and chances) do."""
    own = of_class(fault, hunts)
    return {
        "triggered": bool(own) and all(h.triggered for h in own),
        "caught": bool(own) and all(h.caught for h in own),
        "right_stage": bool(own) and all(h.right_stage for h in own),
        "right_place": bool(own) and all(h.caught and h.place is not False for h in own),
    }


def summary(chosen: Sequence[Fault], hunts: Sequence[Hunt], well: Healthy, seconds: float) -> dict[str, object]:
    """Counts of classes; alarms and checks as single ones. `right_place` counts what no coordinate contradicts."""
    planted = [f for f in chosen if f.planted]
    verdicts = [verdict_of(f, hunts) for f in planted]
    counts = {key: sum(v[key] for v in verdicts) for key in ("triggered", "caught", "right_stage", "right_place")}
    return {
        "planted": len(planted),
        **counts,
        "twins_alarmed": sum(len(h.twin_alarms) for h in hunts),
        "healthy_checks": well.checks + sum(h.twin_checks for h in hunts),
        "false_alarms": len(well.alarms),
        "seconds": round(seconds, 1),
    }


def all_well(chosen: Sequence[Fault], hunts: Sequence[Hunt], well: Healthy) -> bool:
    held = all(all(verdict_of(f, hunts).values()) for f in chosen if f.planted)
    return held and not well.alarms and not any(h.twin_alarms for h in hunts)


def record(h: Hunt) -> dict[str, object]:
    return vars(h) | {"twin_alarms": list(h.twin_alarms), "seconds": round(h.seconds, 2)}


def line(hunts: Sequence[Hunt], json: bool) -> None:
    """Each result as it comes."""
    for h in hunts:
        if json:
            print_json(record(h))
        else:
            console(json).print(_line(h), markup=False)


def _line(h: Hunt) -> str:
    name = f"{h.id} {h.variant}".strip() + (f" p={h.chance:g}" if h.chance < 1 else "")
    if not h.caught:
        return f"{name}: {'NOT CAUGHT' if h.triggered else 'not triggered'} ({h.seconds:.1f} s)"
    after = f"{h.needed} calls" if h.chance < 1 else f"case {h.needed}"
    stage = "" if h.right_stage else " WRONG STAGE"
    place = " WRONG PLACE" if h.place is False else ""
    return f"{name}: caught after {after}{stage}{place}: {h.finding}"


def show(
    chosen: Sequence[Fault],
    hunts: Sequence[Hunt],
    well: Healthy,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    total: dict[str, object],
    json: bool,
) -> None:
    out = console(json)
    for alarm in [*well.alarms, *(a for h in hunts for a in h.twin_alarms)]:
        out.print(f"FALSE ALARM {alarm}", markup=False, style="bold red")
    for fault in chosen:
        if not fault.planted:
            out.print(f"{fault.id} {fault.name}: not planted: {fault.why_not}", markup=False, style="dim")
    for title, rows in (("on our inputs", ours), ("on their own recipes", theirs)):
        if rows:
            out.print("\n".join(_rules(title, rows)), markup=False)
        if json:
            for row in rows:
                print_json({"rows": title, **_row_record(row)})
    if json:
        print_json(total)
    else:
        out.print(", ".join(f"{k} {v}" for k, v in total.items()), markup=False)


def _row_record(row: Row) -> dict[str, object]:
    return vars(row) | {"accepted": list(row.accepted), "nulls": list(row.nulls)}


def _rules(title: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"{title}: faults that each rule lets through"]
    for r in rows:
        blind = f"; null kernels accepted: {', '.join(r.nulls)}" if r.nulls else ""
        health = "" if r.healthy else "; rejects the healthy pipeline"
        lines.append(f"  {r.name}: {r.faults - r.rejected} of {r.faults} pass{blind}{health}")
    return lines


def write(
    folder: Path,
    chosen: Sequence[Fault],
    hunts: Sequence[Hunt],
    well: Healthy,
    ours: Sequence[Row],
    theirs: Sequence[Row],
    total: dict[str, object],
) -> None:
    """FOLDER/results/faults-cpu.json and FOLDER/faults.md."""
    environment = f"python {platform.python_version()}, torch {torch.__version__}, cpu ({platform.machine()})"
    content = results.origin("cpu", folder) | {
        "summary": total,
        "not_planted": {f.id: f.why_not for f in chosen if not f.planted},
        "hunts": [record(h) for h in hunts],
        "our_inputs": [_row_record(r) for r in ours],
        "their_recipes": [_row_record(r) for r in theirs],
    }
    results.write(folder / "results" / "faults-cpu.json", content)
    (folder / "faults.md").write_text(markdown(chosen, hunts, ours, theirs, total, environment), encoding="utf-8")


def markdown(
    chosen: Sequence[Fault],
    hunts: Sequence[Hunt],
    ours: Sequence[Row],
    theirs: Sequence[Row],
    total: dict[str, object],
    environment: str,
) -> str:
    """The readable page."""
    planted = [f for f in chosen if f.planted]
    lines = [
        "# Planted faults",
        "",
        "Written by `moeproof faults --rules --output docs`; figures as JSON in results/faults-cpu.json.",
        f"{environment}. " + ", ".join(f"{k} {v}" for k, v in total.items()) + ".",
        "",
        f"Each of the {len(chosen)} public fault classes is a small edit of a plain MoE pipeline (harness/faults): one step",
        "replaced by one that is wrong. A witness counts only calls in which the faulty step gave another value, address or",
        "order; a neutral twin runs the same edit and keeps the healthy result, and must never raise an alarm. A class counts",
        "as caught where all its variants are. `cases` is how far into the general case list (tier full) each variant had to",
        "go; `calls` is the same for faults that fire by chance, p = 0.3, 0.03 and 0.003, median of five seeds. `place` says",
        "whether the token, slot, expert or rank that the first finding names is one that the fault changed; a dash where it",
        "changed all of them.",
        "",
        "Grounds: " + "; ".join(f"*{k}*: {v}" for k, v in GROUNDS.items()) + ".",
        "",
        "| class | stands for | trigger | ground | caught | stage blamed | place | cases |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [_class_row(f, of_class(f, hunts)) for f in planted]
    lines += ["", "## Not planted", "", "| class | stands for | why not |", "| --- | --- | --- |"]
    lines += [f"| {f.id} {f.name} | {f.stands_for} | {f.why_not} |" for f in chosen if not f.planted]
    notes = [f"- {f.id} {f.name}: {f.note}." for f in planted if f.note]
    if notes:
        lines += ["", "## Notes", "", *notes]
    if ours:
        lines += ["", "## The same faults under public rules, on our inputs", ""]
        lines += [
            "One call with the inputs and the memory on which the harness caught the fault; the whole output is judged, as",
            "these suites do. Hangs, races and histories are left out.",
            "",
        ]
        lines += _rule_table(ours)
    if theirs:
        lines += ["", "## The same faults under public suites' own recipes", ""]
        lines += [
            "Their inputs and rule, clean memory, one call (harness/faults/suites.py).",
            "A fault that a recipe cannot trigger passes: nobody would have seen it.",
            "",
        ]
        lines += _rule_table(theirs)
    return "\n".join(lines) + "\n"


def _class_row(f: Fault, own: Sequence[Hunt]) -> str:
    caught = f"{sum(h.caught for h in own)} of {len(own)}" if len(own) > 1 else ("yes" if own and own[0].caught else "no")
    stages = "right" if all(h.right_stage for h in own) else "wrong"
    blamed = ", ".join(dict.fromkeys(h.finding.split(" ")[0] if h.right_stage else "?" for h in own))
    places = [h.place for h in own if h.place is not None]
    place = "-" if not places else "right" if all(places) else "wrong"
    unit = " calls" if f.random else ""
    needed = ", ".join(str(h.needed) if h.caught else "-" for h in own) + unit
    shown = "error of the call" if f.blame == (None,) and blamed in ("the", "CALL") else blamed
    return (
        f"| {f.id} {f.name} | {f.stands_for} | {f.trigger} | {f.ground} | {caught} | {stages}: {shown} | {place} | {needed} |"
    )


def _rule_table(rows: Sequence[Row]) -> list[str]:
    lines = ["| recipe or rule | faults | let through | share | null kernels accepted | healthy pipeline |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for r in rows:
        passed = r.faults - r.rejected
        nulls = ", ".join(r.nulls) or "-"
        health = "accepted" if r.healthy else "REJECTED"
        lines.append(f"| {r.name} | {r.faults} | {passed} | {passed / max(r.faults, 1):.0%} | {nulls} | {health} |")
    return lines
