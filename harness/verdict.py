"""Verdicts that cannot lie: impossible combinations are refused when they are built.

FAIL without a finding, PASS with nothing checked, UNSUPPORTED without a reason do not exist.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from enum import Enum

from moeproof.harness.cases.case import Case
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import rank_seed


class Outcome(str, Enum):
    PASS = "PASS"
    FAIL = "FAIL"
    FLAKY = "FLAKY"
    ERROR = "ERROR"
    TIMEOUT = "TIMEOUT"
    VACUOUS = "VACUOUS"
    UNSUPPORTED = "UNSUPPORTED"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, with decoded coordinates. None where a coordinate does not apply."""

    stage: Stage | None
    tensor: str
    message: str
    token: int | None = None
    slot: int | None = None
    expert: int | None = None
    column: int | None = None
    rank: int | None = None
    got: float | None = None
    want: float | None = None
    allowed: float | None = None
    bad: int = 0
    total: int = 0
    pattern: str = ""

    def __str__(self) -> str:
        where = [f"{k} {v}" for k in ("token", "slot", "expert", "column", "rank") if (v := getattr(self, k)) is not None]
        text = f"{self.stage or 'CALL'} {self.tensor}: {self.message}"
        if where:
            text += f" at {', '.join(where)}"
        if self.got is not None and self.want is not None:
            text += f": got {self.got:.9g}, want {self.want:.9g}"
            if self.allowed is not None:
                text += f" (off by {abs(self.got - self.want):.3g}, allowed {self.allowed:.3g})"
        if self.total:
            text += f"; {self.bad} of {self.total} bad"
        if self.pattern:
            text += f"; {self.pattern}"
        return text


@dataclass(frozen=True)
class Verdict:
    """What came of one candidate on one case."""

    outcome: Outcome
    candidate: str
    case: Case
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    """Why it is UNSUPPORTED, ERROR, TIMEOUT or VACUOUS."""
    checked: int = 0
    """Facts compared: tensor elements, and one for each shape and dtype."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest observed/allowed error per tensor. 0 for tensors that are compared bit by bit."""
    claims: str = "default"
    seconds: float = 0.0
    environment: str = ""
    source: str = ""
    """What a command line calls the candidate; empty where its name is enough."""
    rank: int | None = None
    """The rank to look at, where a case on several ranks did not pass."""
    transport: str = ""
    """What carried the bytes between the ranks; empty on a single rank."""

    def __post_init__(self) -> None:
        rules = {
            Outcome.PASS: (self.checked > 0 and not self.findings, "PASS must have checked something and found nothing"),
            Outcome.FAIL: (bool(self.findings), "FAIL needs a finding"),
            Outcome.FLAKY: (bool(self.findings), "FLAKY needs a finding"),
            Outcome.ERROR: (bool(self.reason), "ERROR needs a reason"),
            Outcome.TIMEOUT: (bool(self.reason), "TIMEOUT needs a reason"),
            Outcome.VACUOUS: (bool(self.reason), "VACUOUS needs a reason"),
            Outcome.UNSUPPORTED: (bool(self.reason), "UNSUPPORTED needs a reason"),
        }
        holds, rule = rules[self.outcome]
        if not holds:
            raise ValueError(f"impossible verdict for {self.candidate} on {self.case}: {rule}")

    @property
    def worst_ratio(self) -> float:
        return max(self.worst.values(), default=0.0)

    @property
    def rank_seeds(self) -> tuple[int, ...]:
        """What each rank's own generator starts from; empty on a single rank."""
        return tuple(rank_seed(self.case.seed, rank) for rank in range(self.case.ranks)) if self.transport else ()

    @property
    def replay(self) -> str:
        """The line that repeats it."""
        transport = f" --transport {self.transport}" if self.transport else ""
        return f'moeproof replay "{self.case}" --candidate {shlex.quote(self.source or self.candidate)}{transport}'

    def __str__(self) -> str:
        lines = [f"{self.outcome} {self.candidate} on {self.case}"]
        if self.reason:
            lines.append(f"  {self.reason}")
        lines += [f"  {finding}" for finding in self.findings]
        if self.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED):
            if self.rank_seeds:
                lines.append(f"  rank seeds {', '.join(map(str, self.rank_seeds))}")
            lines.append(f"  {self.replay}")
        return "\n".join(lines)
