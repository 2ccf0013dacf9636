"""Candidates over cases on several ranks: one pool for all of them, one verdict for each."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import Case
from moeproof.harness.ranks import call
from moeproof.harness.ranks.call import Answer
from moeproof.harness.ranks.compare import Mismatch
from moeproof.harness.ranks.judge import Judgement
from moeproof.harness.ranks.outcome import Ending, RankRun
from moeproof.harness.ranks.pairs import support
from moeproof.harness.ranks.pool import DEADLINE, START_DEADLINE, RankPool
from moeproof.harness.ranks.runner import Reply
from moeproof.harness.ranks.torchrun import TorchrunWorld
from moeproof.harness.ranks.transport import unavailable
from moeproof.harness.ranks.watchdog import first_refusal
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.stages import Stage
from moeproof.reference.eager.ranks_link import Apart, Missing, on_threads

OUTCOMES = {
    Ending.MISMATCH: Outcome.FAIL,
    Ending.RAISED: Outcome.ERROR,
    Ending.DIED: Outcome.ERROR,
    Ending.HUNG: Outcome.TIMEOUT,
}


class RankSession:
    """Judges RankPairs on a world of `ranks` over one transport. The pool starts with the first case that runs.

    With transport `simulated` the ranks are threads of this process: no watchdog can end them, but the links give up after
    the deadline. With a TorchrunWorld every rank has its own session, and all judge the same cases in order. A RankPool that
    is given serves others as well.
    """

    _pool: RankPool | TorchrunWorld | None

    def __init__(
        self,
        ranks: int,
        transport: str,
        deadline: float = DEADLINE,
        world: TorchrunWorld | RankPool | None = None,
    ) -> None:
        self.ranks, self.transport, self.deadline = ranks, transport, deadline
        self._given, self._pool = world, world
        self._settled: tuple[int, set[object]] = 0, set()
        """(the start of the pool, the candidates that its ranks have loaded)."""
        self._no_start: RankRun | None = None

    def judge(self, candidate: str | RankPair, pair: RankPair, case: Case, lean: bool = False) -> Verdict:
        """Run `pair` on every rank. `candidate` is what travels to the ranks: its name, or the pair itself.

        Lean: one call and one look at the values, enough to see a wrong value or a hang again, not to PASS anything on.
        """
        start = time.perf_counter()
        make = functools.partial(
            Verdict, candidate=pair.name, case=case, claims=str(pair.claims), transport=self.transport, source=pair.source
        )
        device = "cpu" if self.transport in ("simulated", "gloo") else "cuda"

        def verdict(outcome: Outcome, **rest: object) -> Verdict:
            where = f"{modes.environment(pair.backend, device)}, {case.ranks} ranks over {self.transport}"
            return make(outcome, seconds=time.perf_counter() - start, environment=where, **rest)  # type: ignore[arg-type]

        if case.ranks != self.ranks:
            raise ContractError(f"the case has ranks={case.ranks}, this session {self.ranks}; they must be equal")
        if reason := self._unsupported(pair, case):
            return verdict(Outcome.UNSUPPORTED, reason=reason)
        simulated = self.transport == "simulated"
        answers = self._simulate(pair, case, lean) if simulated else self._run(candidate, case, lean)
        if isinstance(answers, RankRun):
            if answers.refused and case.routing == "beyond":
                return verdict(Outcome.UNSUPPORTED, reason=f"refuses ids >= E, as it may: {answers.headline}")
            return verdict(**_failed(answers))  # type: ignore[arg-type]
        return verdict(**_judged(case, answers, pair, lean))  # type: ignore[arg-type]

    def take_part(self, candidate: str | RankPair, pair: RankPair, case: Case) -> None:
        """What judge() makes this rank do, without the verdict: for ranks of torchrun that do not report."""
        if not self._unsupported(pair, case):
            self._run(candidate, case, lean=False)

    def _unsupported(self, pair: RankPair, case: Case) -> str | None:
        reason = None if self._given else unavailable(self.transport, self.ranks)
        if reason := reason or support(pair, case.world, self.transport):
            return reason
        if case.huge or case.history == "stream":
            what = "huge=1" if case.huge else "history=stream"
            return f"{what} is judged on one rank"
        if self.transport == "simulated" and pair.backend == "triton" and modes.interpreting():
            return "Triton's interpreter serves one thread, and simulated ranks are threads; use gloo"
        return None

    def load(self, candidate: str | RankPair) -> RankRun | None:
        """Start the ranks where there are none, and have them import the candidate. None, or how that failed."""
        if self._no_start is not None:
            return self._no_start  # it is not the case's fault, and would cost as long for each
        pool = self._pool = self._pool or RankPool(self.ranks, self.transport, deadline=self.deadline)
        start, loaded = self._settled if pool.pids else (0, set())
        if start != pool.starts or candidate not in loaded:
            # Imports are no part of the case, and must not eat up its deadline.
            run = pool.run(call.settle, candidate if isinstance(candidate, str) else None, deadline=START_DEADLINE)
            if not run.started:
                self._no_start = run
            if not run.ok:
                return run
            self._settled = pool.starts, {candidate} | (loaded if start == pool.starts else set())
        return None

    def _run(self, candidate: str | RankPair, case: Case, lean: bool) -> list[Answer] | RankRun:
        if (failed := self.load(candidate)) is not None:
            return failed
        assert self._pool is not None, "load started it"
        run = self._pool.run(call.judged_calls, candidate, str(case), lean, seed=case.seed)
        return list(run.results) if run.ok else run

    def _simulate(self, pair: RankPair, case: Case, lean: bool) -> list[Answer] | RankRun:
        device = torch.device("cpu")
        results = on_threads(self.ranks, lambda link: call.answer(pair, str(case), link, device, lean), self.deadline)
        errors = [(r, e) for r, e in enumerate(results) if isinstance(e, Exception)]
        if not errors:
            return results
        # A rank that raises breaks the barrier in which the others wait.
        rank, error = next(((r, e) for r, e in errors if type(e).__name__ != "BrokenBarrierError"), errors[0])
        if isinstance(error, Missing):
            look = "" if error.rank is None else f"; look at rank {error.rank}"
            return RankRun(Ending.HUNG, (), rank=error.rank, headline=f"{error}{look}")
        refused = isinstance(error, ContractError)
        said = {r: Reply(error=str(e)) for r, e in errors}
        rank = error.rank if isinstance(error, Apart) else first_refusal(said, [rank, *said])
        own = dict(errors).get(rank, error)
        error = error if type(own).__name__ == "BrokenBarrierError" else own
        headline = f"rank {rank} {'refused its arguments' if refused else 'raised'}: {type(error).__name__}: {error}"
        return RankRun(Ending.RAISED, (), rank=rank, headline=headline, refused=refused)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()


def _failed(run: RankRun) -> dict[str, object]:
    """The verdict's fields for a run that did not come back from every rank in step."""
    findings = tuple(_finding(m) for m in run.mismatches)
    return {"outcome": OUTCOMES[run.ending], "reason": run.reason, "findings": findings, "rank": run.rank}


def _finding(m: Mismatch) -> Finding:
    entry = m.entry or m.other_entry
    stage = next((s for s in Stage if entry is not None and s.value == entry.stage), None)
    return Finding(stage, "collectives", str(m), rank=m.rank)


def _judged(case: Case, answers: Sequence[Answer], pair: RankPair, lean: bool) -> dict[str, object]:
    """The verdict's fields for what every rank showed."""
    judgement = Judgement(case, pair, [a.calls for a in answers], lean)
    replayed = [a.replays for a in answers if not isinstance(a.replays, str)]
    reason = next((a.replays for a in answers if isinstance(a.replays, str)), "")
    ruling = judgement.ruling(replayed if len(replayed) == len(answers) else reason)
    found = ruling.findings
    return {
        "outcome": ruling.outcome,
        "findings": found,
        "reason": ruling.reason,
        "rank": found[0].rank if found else None,
        "checked": judgement.tally.checked,
        "worst": judgement.tally.worst,
    }
