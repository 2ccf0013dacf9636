"""`moeproof faults --gpu`: what only a GPU can trigger, hunted there; and its section of docs/faults.md."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moeproof.harness.faults.catalogue import by_id
from moeproof.harness.faults.hunt import Hunt
from moeproof.harness.faults.on_gpu import PLANTINGS, hunt_on_gpu, shrunk_on_gpu
from moeproof.harness.reports import results
from moeproof.harness.reports.report import console, print_json
from moeproof.harness.shrinking.shrink import Shrunk

FILE = Path("results") / "faults-gpu.json"


def main(output: Path | None, json: bool) -> int:
    """Hunt and shrink every planting; 0 where each fired, was caught on the right stage, and its twin passed."""
    rows: list[dict[str, object]] = []
    for planted in PLANTINGS:
        found = hunt_on_gpu(planted)
        small = _small(shrunk_on_gpu(planted)) if found.caught else {}
        rows.append({"label": planted.label, "history": planted.history, "hunt": asdict(found), "shrunk": small})
        if json:
            print_json(rows[-1])
        else:
            words = f"caught: {found.finding}" if found.caught else f"NOT CAUGHT ({found.outcome})"
            size = f"; {small['tokens']} tokens after {small['seconds']} s" if small else ""
            console(json).print(f"{planted.label}: {words}{size}", markup=False)
        for alarm in found.twin_alarms:
            console(json).print(f"FALSE ALARM {alarm}", markup=False, style="bold red")
    summary = _summary([Hunt(**row["hunt"]) for row in rows])  # type: ignore[arg-type]
    if json:
        print_json(summary)
    if output is not None:
        results.write(output / FILE, results.origin("cuda", output) | {"summary": summary, "plantings": rows})
    held = all(summary[key] == summary["planted"] for key in ("triggered", "caught", "right_stage"))
    return 0 if held and not summary["twins_alarmed"] else 1


def _small(found: Shrunk) -> dict[str, object]:
    """What the record keeps: such a layer is found by no name, so there is no line to replay it by."""
    return {key: value for key, value in found.as_dict().items() if key not in ("steps", "replay")}


def _summary(hunts: list[Hunt]) -> dict[str, object]:
    return {
        "planted": len(hunts),
        "triggered": sum(h.triggered for h in hunts),
        "caught": sum(h.caught for h in hunts),
        "right_stage": sum(h.right_stage for h in hunts),
        "twins_alarmed": sum(len(h.twin_alarms) for h in hunts),
    }


def section(folder: Path) -> list[str]:
    """The plantings as a table, with what became of them where FOLDER/results has it."""
    path = folder / FILE
    record: Mapping[str, Any] = jsonlib.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {row["label"]: row for row in record.get("plantings", ())}
    where = (
        f"On an {record['device']}: {', '.join(f'{k} {v}' for k, v in record['summary'].items())}." if record else "Not run."
    )
    lines = [
        "",
        "## What only a GPU can trigger",
        "",
        f"{len(PLANTINGS)} more plantings of classes above (harness/faults/on_gpu.py): a layer that is right call by call, and",
        "wrong on a side stream, or once it is captured in a graph and memory changes its owners between replays. Hunted by",
        f"`moeproof faults --gpu --output docs`. {where}",
        "",
        "| planting | needs | caught as | shrunk |",
        "| --- | --- | --- | --- |",
    ]
    return lines + [_row(planted.label, planted.history, found.get(planted.label)) for planted in PLANTINGS]


def _row(label: str, history: str, row: Mapping[str, Any] | None) -> str:
    id, _, variant = label.partition(" ")
    cells = [f"{by_id(id).id} {by_id(id).name}, {variant}", f"history={history}"]
    if row is None:
        return "| " + " | ".join([*cells, "-", "-"]) + " |"
    hunt, small = row["hunt"], row["shrunk"]
    caught = hunt["finding"] if hunt["caught"] else "not caught"
    return "| " + " | ".join([*cells, caught, f"{small['tokens']} in {small['seconds']:.1f} s" if small else "-"]) + " |"
