"""What `moeproof faults` found out, as data, and the figures that follow from it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.healthy import Healthy
from moeproof.harness.faults.hunt import Hunt
from moeproof.harness.faults.nulls import Taken
from moeproof.harness.faults.shrunk import Small
from moeproof.harness.faults.side_by_side import Row

FEW_TOKENS = 4
"""What every class should shrink to, unless its trigger needs more."""


@dataclass
class Campaign:
    """Classes chosen, and everything that was done with them."""

    chosen: Sequence[Fault]
    default_cases: int
    jobs: int
    hunts: list[Hunt] = field(default_factory=list)
    smalls: list[Small] = field(default_factory=list)
    well: Healthy = field(default_factory=Healthy)
    ours: list[Row] = field(default_factory=list)
    theirs: list[Row] = field(default_factory=list)
    nulls: list[Taken] = field(default_factory=list)
    default_seconds: float = 0.0
    default_cpu_seconds: float = 0.0
    """Wall and processor time in which the default tier was hunted through, twins included."""
    seconds: float = 0.0

    @property
    def planted(self) -> list[Fault]:
        return [f for f in self.chosen if f.planted]

    def of(self, fault: Fault) -> list[Hunt]:
        return [h for h in self.hunts if h.id == fault.id]

    def verdict_of(self, fault: Fault) -> dict[str, bool]:
        """A class holds where all its plantings do: variants, schemes and chances."""
        own = self.of(fault)
        return {
            "triggered": bool(own) and all(h.triggered for h in own),
            "caught": bool(own) and all(h.caught for h in own),
            "right_stage": bool(own) and all(h.right_stage for h in own),
            "right_place": bool(own) and all(h.caught and h.place is not False for h in own),
        }

    def by_default(self, fault: Fault) -> bool:
        """Whether the default tier catches every variant, at every chance, in one scheme at least."""
        kinds: Mapping[tuple[str, float], list[bool]] = {(h.variant, h.chance): [] for h in self.of(fault)}
        for h in self.of(fault):
            kinds[h.variant, h.chance].append(h.caught and h.number < self.default_cases)
        return bool(kinds) and all(any(caught) for caught in kinds.values())

    @property
    def summary(self) -> dict[str, object]:
        """Counts of classes; alarms and checks as single ones. `right_place` counts what no coordinate contradicts."""
        verdicts = [self.verdict_of(f) for f in self.planted]
        counts = {key: sum(v[key] for v in verdicts) for key in ("triggered", "caught", "right_stage", "right_place")}
        return {
            "planted": len(self.planted),
            **counts,
            "twins_alarmed": sum(len(h.twin_alarms) for h in self.hunts),
            "healthy_checks": self.well.checks + sum(h.twin_checks for h in self.hunts),
            "false_alarms": len(self.well.alarms),
            "seconds": round(self.seconds, 1),
        }

    @property
    def plantings(self) -> dict[str, int]:
        """The same by single planting; `placed` are those whose finding can have a place."""
        placed = [h for h in self.hunts if h.place is not None]
        return {
            "planted": len(self.hunts),
            "triggered": sum(h.triggered for h in self.hunts),
            "caught": sum(h.caught for h in self.hunts),
            "right_stage": sum(h.right_stage for h in self.hunts),
            "placed": len(placed),
            "right_place": sum(bool(h.place) for h in placed),
        }

    @property
    def default_tier(self) -> dict[str, object]:
        caught = [f.id for f in self.planted if self.by_default(f)]
        return {
            "cases": self.default_cases,
            "classes": len(self.planted),
            "caught": len(caught),
            "missed": [f.id for f in self.planted if f.id not in caught],
            "seconds": round(self.default_seconds, 1),
            "cpu_seconds": round(self.default_cpu_seconds, 1),
            "jobs": self.jobs,
        }

    def small_enough(self, small: Small) -> bool:
        fault = next(f for f in self.chosen if f.id == small.id)
        return 0 <= small.tokens <= max(FEW_TOKENS, fault.least)

    @property
    def shrinking(self) -> dict[str, object]:
        seconds = [s.seconds for s in self.smalls]
        return {
            "classes": len(self.smalls),
            "small_enough": sum(self.small_enough(s) for s in self.smalls),
            "larger": [s.id for s in self.smalls if not self.small_enough(s)],
            "median_tokens": statistics.median(s.tokens for s in self.smalls) if self.smalls else 0,
            "median_seconds": round(statistics.median(seconds), 2) if seconds else 0.0,
            "median_cpu_seconds": round(statistics.median(s.cpu_seconds for s in self.smalls), 2) if seconds else 0.0,
            "longest_seconds": round(max(seconds, default=0.0), 1),
        }

    @property
    def all_well(self) -> bool:
        held = all(all(self.verdict_of(f).values()) for f in self.planted)
        small = all(self.small_enough(s) for s in self.smalls)
        return held and small and not self.well.alarms and not any(h.twin_alarms for h in self.hunts)
