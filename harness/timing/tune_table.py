"""The table that `moeproof tune` writes and a candidate's dispatcher reads, and what it says about points that are alike."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moeproof.harness.reports import results
from moeproof.harness.timing.bench import Peers
from moeproof.harness.timing.points import SIZES, Work
from moeproof.reference.contract.errors import check

NEIGHBOURS = 8
FAR = 2.5
"""Points further apart than this say nothing about each other: in doublings of the rows of an expert."""


@dataclass
class Table:
    """Row -> tokens -> configuration; and for each point it was measured at, as `Work` prints it, configuration and time."""

    plans: dict[str, dict[str, str]] = field(default_factory=dict)
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path | None) -> Table:
        """The table of a file; an empty one where there is none."""
        if path is None or not path.is_file():
            return cls()
        record = json.loads(path.read_text(encoding="utf-8"))
        check("plans" in record and "measured" in record, f"'{path}' is no table: it has no 'plans' and 'measured'")
        return cls(record["plans"], record["measured"])

    def set(self, row: str, best: str, works: Sequence[Work], times: Sequence[float]) -> None:
        self.plans.setdefault(row, {})[str(works[0].M)] = best
        for work, us in zip(works, times, strict=True):
            self.measured[str(work)] = {"us": round(us, 2), "plan": best}

    def write(self, path: Path, made: Mapping[str, object]) -> None:
        results.write(path, {"plans": self.plans, "measured": self.measured, "made": dict(made)})


def nearest(work: Work, measured: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Configurations that were best at points like this one, the likeliest first: what counts is the rows of an expert."""
    found: dict[str, float] = {}
    for text, cell in measured.items():
        model, tokens, _ = text.split()
        if model in SIZES:
            distance = abs(math.log2(_rows(model, int(tokens.removeprefix("M="))) / _rows(work.model, work.M)))
            distance += model != work.model
            if distance <= FAR:
                found[cell["plan"]] = min(distance, found.get(cell["plan"], FAR))
    return sorted(found, key=found.__getitem__)[:NEIGHBOURS]


def _rows(model: str, M: int) -> float:
    experts, slots, *_ = SIZES[model]
    return M * slots / experts


def weak(works: Sequence[Work], readings: Path, peers: Peers, candidate: str, below: float) -> list[Work]:
    """Points where, by a results file of `moeproof bench`, best peer's time / the candidate's own is under `below`, and those
    without a reading. All routings of a point come with it."""
    check(readings.is_file(), f"results file '{readings}' does not exist")
    times = {}
    for r in json.loads(readings.read_text(encoding="utf-8")).get("readings", []):
        if r["candidate"] == candidate and "us" in r:
            times[r["kind"], r["model"], r["routing"], r["M"]] = float(r["us"])
    chosen = set()
    for work in works:
        key = (work.kind, work.model, work.routing, work.M)
        best = peers.get(key, {}).get("best", math.inf)
        if best < below * times.get(key, math.inf):
            chosen.add((work.model, work.M))
    return [work for work in works if (work.model, work.M) in chosen]
