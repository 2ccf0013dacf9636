"""What came of one function on all ranks, in words that name the rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from moeproof.harness.ranks.compare import Mismatch
from moeproof.harness.ranks.journal import Entry


class Ending(str, Enum):
    DONE = "every rank came back, and their collectives agree"
    MISMATCH = "every rank came back, but their collectives differ"
    RAISED = "a rank raised"
    DIED = "a rank's process ended"
    HUNG = "a rank did not come back"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class RankState:
    """Where one rank was when the run ended."""

    rank: int
    pid: int
    state: str
    """returned, raised TypeError, still running, killed by SIGKILL, exited with code 3, ..."""
    stage: str = ""
    last: Entry | None = None
    """The last collective it called; `last.finished` says whether the call returned."""
    stack: tuple[str, ...] = ()
    """Python frames, innermost last, of a rank that hung, crashed or raised."""
    output: tuple[str, ...] = ()
    """The last lines it printed."""

    def __str__(self) -> str:
        parts = [f"rank {self.rank} (pid {self.pid}): {self.state}"]
        if self.stage:
            parts.append(f"stage {self.stage}")
        if self.last is None:
            parts.append("no collective called")
        else:
            parts.append(f"{'last' if self.last.finished else 'inside'} collective {self.last}")
        lines = [", ".join(parts)]
        lines += [f"    {frame}" for frame in self.stack]
        lines += [f"    printed: {line}" for line in self.output]
        return "\n".join(lines)


@dataclass(frozen=True)
class RankRun:
    """One function on every rank, and how it ended."""

    ending: Ending
    states: tuple[RankState, ...]
    results: tuple[Any, ...] = ()
    """What the function returned on each rank; only where all ranks returned."""
    rank: int | None = None
    """The rank to look at: the one that died, raised first, or differs from the rest."""
    headline: str = ""
    mismatches: tuple[Mismatch, ...] = ()
    seeds: tuple[int, ...] = ()
    seconds: float = 0.0
    refused: bool = False
    """The rank raised a ContractError: it refused its arguments."""
    started: bool = True
    """False where the ranks could not be started: the function was never called."""
    note: str = ""
    """What happened to the pool since its last run, where something did."""

    @property
    def ok(self) -> bool:
        return self.ending is Ending.DONE

    @property
    def reason(self) -> str:
        """The headline, what differs, and where each rank was. Empty where the run is ok."""
        if self.ok:
            return ""
        return "\n  ".join([self.headline, *(str(m) for m in self.mismatches), *(str(s) for s in self.states)])

    def __str__(self) -> str:
        return f"{self.ending.name}: {self.reason}" if not self.ok else f"DONE: {len(self.results)} ranks returned"
