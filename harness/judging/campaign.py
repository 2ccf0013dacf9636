"""The record of a campaign: counts that pieces run anywhere add up to, kept in one results file.

A piece is a range of one part's cases, judged by one set of candidates. A record says which pieces it holds, so that a
campaign goes on where it stopped, and two machines' records become one; nothing is counted twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from moeproof.harness.reports import results
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.errors import check

ALARMS = (Outcome.FAIL, Outcome.FLAKY, Outcome.ERROR, Outcome.TIMEOUT)
"""VACUOUS accuses nobody: it says that a case proves nothing. It is counted, and is no stage check."""
BINS = 10
"""Of observed/allowed, from 0 to 1; exact results have a bin of their own before them."""
KEPT = 50
"""Alarms whose text is kept; all are counted."""


class Piece(NamedTuple):
    """Cases `first` .. `end` - 1 of a part, for the named set of candidates."""

    part: str
    candidates: str
    first: int
    end: int

    @property
    def series(self) -> str:
        return f"{self.part}, {self.candidates}"


class Cell(NamedTuple):
    """What stage checks are counted by."""

    candidate: str
    scheme: str
    layout: str
    recipe: str


@dataclass
class Spread:
    """How close the judged errors of one tensor came to what was allowed, case by case."""

    largest: float = 0.0
    bins: list[int] = field(default_factory=lambda: [0] * (BINS + 1))
    """Cases without any error, then cases by the tenth that their largest observed/allowed error is in."""

    def add(self, ratio: float) -> None:
        self.largest = max(self.largest, ratio)
        self.bins[0 if ratio == 0 else 1 + min(int(ratio * BINS), BINS - 1)] += 1

    def merge(self, other: Spread) -> None:
        self.largest = max(self.largest, other.largest)
        self.bins = [a + b for a, b in zip(self.bins, other.bins, strict=True)]


@dataclass
class Record:
    """Counts of everything judged so far. `merge` adds another record of the same mode to it."""

    mode: str
    cases: int = 0
    facts: int = 0
    alarms: int = 0
    alarm_texts: list[str] = field(default_factory=list)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By (candidate, outcome)."""
    checks: Counter[Cell] = field(default_factory=Counter)
    """Stage checks: tensors of verdicts that passed, each judged against its bound."""
    spreads: dict[str, Spread] = field(default_factory=dict)
    """By tensor."""
    done: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """By series: ranges of cases [first, end), ascending and apart."""
    runs: list[dict[str, object]] = field(default_factory=list)
    """Where the figures come from: command, device, versions and date of each run."""

    def add_verdict(self, verdict: Verdict) -> None:
        self.outcomes[verdict.candidate, verdict.outcome.value] += 1
        if verdict.outcome in ALARMS:
            self.add_alarm(str(verdict))
        if verdict.outcome is not Outcome.PASS:
            return
        p = verdict.case.problem
        self.facts += verdict.checked
        self.checks[Cell(verdict.candidate, p.scheme, p.layout, verdict.case.values)] += len(verdict.worst)
        for tensor, ratio in verdict.worst.items():
            self.spreads.setdefault(tensor, Spread()).add(ratio)

    def add_alarm(self, text: str) -> None:
        self.alarms += 1
        if len(self.alarm_texts) < KEPT:
            self.alarm_texts.append(text)

    def finish(self, piece: Piece) -> None:
        """Note that a piece is in these counts. Raises ContractError where some of it already was."""
        self.cases += piece.end - piece.first
        self._cover(piece.series, [(piece.first, piece.end)])

    def missing(self, whole: Piece, size: int) -> Iterator[Piece]:
        """What these counts lack of `whole`, in pieces of at most `size` cases, cut at multiples of it."""
        at = whole.first
        for first, end in [*self.done.get(whole.series, []), (whole.end, whole.end)]:
            while at < min(first, whole.end):
                stop = min(at - at % size + size, first, whole.end)
                yield whole._replace(first=at, end=stop)
                at = stop
            at = max(at, end)

    def merge(self, other: Record) -> None:
        """Add all of `other`. Raises ContractError where the two modes differ, or both hold some piece."""
        check(self.mode == other.mode, f"records of modes '{self.mode}' and '{other.mode}' do not add up")
        for series, ranges in other.done.items():
            self._cover(series, ranges)
        self.cases += other.cases
        self.facts += other.facts
        self.alarms += other.alarms
        self.alarm_texts = [*self.alarm_texts, *other.alarm_texts][:KEPT]
        self.outcomes += other.outcomes
        self.checks += other.checks
        for tensor, spread in other.spreads.items():
            self.spreads.setdefault(tensor, Spread()).merge(spread)
        self.runs += other.runs

    def _cover(self, series: str, ranges: Iterable[tuple[int, int]]) -> None:
        joined: list[tuple[int, int]] = []
        for first, end in sorted([*self.done.get(series, []), *ranges]):
            check(not joined or first >= joined[-1][1], f"'{series}': cases {first} to {end - 1} would be counted twice")
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], end)
            else:
                joined.append((first, end))
        self.done[series] = joined

    def as_dict(self) -> dict[str, object]:
        by_candidate: dict[str, dict[str, int]] = {}
        for (candidate, outcome), count in sorted(self.outcomes.items()):
            by_candidate.setdefault(candidate, {})[outcome] = count
        cells: dict[str, dict[str, dict[str, dict[str, int]]]] = {}
        for cell, count in sorted(self.checks.items()):
            cells.setdefault(cell.candidate, {}).setdefault(cell.scheme, {}).setdefault(cell.layout, {})[cell.recipe] = count
        for candidate, by_outcome in by_candidate.items():
            by_outcome["stage_checks"] = sum(count for cell, count in self.checks.items() if cell.candidate == candidate)
        return {
            "mode": self.mode,
            "alarms": self.alarms,
            "stage_checks": self.checks.total(),
            "vacuous": sum(count for (_, outcome), count in self.outcomes.items() if outcome == "VACUOUS"),
            "cases": self.cases,
            "facts": self.facts,
            "by_candidate": by_candidate,
            "observed_over_allowed": {t: {"largest": s.largest, "bins": s.bins} for t, s in sorted(self.spreads.items())},
            "runs": self.runs,
            "done": self.done,
            "alarm_texts": self.alarm_texts,
            "stage_checks_by_candidate_scheme_layout_recipe": cells,
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> Record:
        """The inverse of as_dict, up to the order of keys."""
        stored_candidates: dict[str, dict[str, int]] = stored["by_candidate"]  # type: ignore[assignment]
        stored_cells: dict[str, dict[str, dict[str, dict[str, int]]]] = stored[CELLS]  # type: ignore[assignment]
        record = cls(str(stored["mode"]))
        record.cases, record.facts, record.alarms = (int(str(stored[key])) for key in ("cases", "facts", "alarms"))
        record.alarm_texts, record.runs = list(stored["alarm_texts"]), list(stored["runs"])  # type: ignore[call-overload]
        for candidate, by_outcome in stored_candidates.items():
            for outcome, count in by_outcome.items():
                if outcome != "stage_checks":
                    record.outcomes[candidate, outcome] = count
        for candidate, schemes in stored_cells.items():
            for scheme, layouts in schemes.items():
                for layout, recipes in layouts.items():
                    for recipe, count in recipes.items():
                        record.checks[Cell(candidate, scheme, layout, recipe)] = count
        for tensor, spread in stored["observed_over_allowed"].items():  # type: ignore[attr-defined]
            record.spreads[tensor] = Spread(spread["largest"], list(spread["bins"]))
        for series, ranges in stored["done"].items():  # type: ignore[attr-defined]
            record.done[series] = [(first, end) for first, end in ranges]
        return record


CELLS = "stage_checks_by_candidate_scheme_layout_recipe"


def read(path: Path) -> Record:
    """A record from its file. Raises ContractError where the file is none."""
    try:
        return Record.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        check(False, f"'{path}' holds no record of a campaign ({type(error).__name__}: {error})")
        raise


def write(path: Path, record: Record) -> None:
    """Whole or not at all."""
    results.write(path, record.as_dict())
