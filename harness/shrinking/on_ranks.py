"""Attempts on several ranks: one pool for each number of ranks, new ones after a hang, which then costs less."""

from __future__ import annotations

from moeproof.harness.cases.case import Case
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import RankPair

DEADLINE, HANG_DEADLINE = 20.0, 5.0
"""Seconds for a case, and once the first has timed out: a hang would otherwise cost the whole deadline at every step."""
KEPT = 2
"""Pools that stay: the number of ranks that shrinking has come to, and the one that it tries."""


class RankAttempts:
    """Judges one RankPair on cases of any number of ranks. `candidate` is what travels: its name, or the pair itself."""

    def __init__(self, candidate: str | RankPair, pair: RankPair, transport: str) -> None:
        self.candidate, self.pair, self.transport = candidate, pair, transport
        self.deadline = DEADLINE
        self._sessions: dict[int, RankSession] = {}

    def __call__(self, case: Case, lean: bool) -> Verdict:
        session = self._sessions.pop(case.ranks, None) or RankSession(case.ranks, self.transport, self.deadline)
        self._sessions[case.ranks] = session  # the last one is the latest
        while len(self._sessions) > KEPT:
            self._sessions.pop(next(iter(self._sessions))).close()
        verdict = session.judge(self.candidate, self.pair, case, lean)
        if verdict.outcome is Outcome.TIMEOUT and self.deadline > HANG_DEADLINE:
            self.close()
            self.deadline = HANG_DEADLINE
        return verdict

    def fresh(self) -> None:
        """No history, and the whole deadline again."""
        self.close()
        self.deadline = DEADLINE

    def close(self) -> None:
        while self._sessions:
            self._sessions.popitem()[1].close()
