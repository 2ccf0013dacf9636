"""`moeproof bench --ranks N`: dispatch and combine of candidates for several ranks, beside bare collectives of the transport.

Every candidate is judged against the oracle first, on the same ranks, tokens and experts at a small hidden size, and at the
full size by who arrived and what came back. The slowest rank counts: a repeat takes as long as its last rank does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from moeproof.harness.cases.case import Case
from moeproof.harness.ranks.bench_calls import RAW
from moeproof.harness.ranks.bench_clock import Laps, Samples, time_pair, time_raw
from moeproof.harness.ranks.bench_load import Load, busiest, full_size
from moeproof.harness.ranks.outcome import RankRun
from moeproof.harness.ranks.pairs import support
from moeproof.harness.ranks.pool import RankPool
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.ranks.tags import BASE, DIGITS
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.problem import Problem

TOKENS = {"cpu": (1, 16, 128), "cuda": (1, 16, 128, 1024, 4096, 16384)}
"""Per rank, where nobody says how many."""
MOST_TOKENS = BASE * BASE
JUDGED_TOKENS, JUDGED_HIDDEN = 128, 64
"""At most so many of each rank are held against the float64 oracle; the full size is proved by identity."""


@dataclass(frozen=True)
class Phase:
    """Microseconds over the repeats, of the slowest rank each; GB/s are bytes a direction of the busiest rank."""

    us: float
    us_min: float
    us_max: float
    gbs: float


@dataclass(frozen=True)
class Phases:
    dispatch: Phase
    combine: Phase
    both: Phase


@dataclass(frozen=True)
class Reading:
    """One candidate, or one bare collective, at one number of tokens. Without times where `reason` says why."""

    candidate: str
    transport: str
    ranks: int
    T: int
    """Tokens of each rank."""
    case: str
    """What was timed."""
    judged: str = ""
    """What the oracle judged before; empty for a bare collective."""
    reason: str = ""
    dispatch: Phase | None = None
    combine: Phase | None = None
    both: Phase | None = None
    """dispatch and combine in one, without a barrier between them."""
    tokens_per_s: float = math.nan
    """Of all ranks together, by `both`."""
    replayed: Phases | None = None
    """The same in CUDA graphs, of what can be captured."""
    dispatch_bytes: int = 0
    """A direction: what must move, or what the bare collective moves."""
    combine_bytes: int = 0
    repeats: int = 0

    def record(self) -> dict[str, object]:
        """For JSON: rounded, and without what is not known."""

        def rounded(value: object) -> object:
            if isinstance(value, dict):
                return {k: rounded(v) for k, v in value.items()}
            return round(value, 3) if isinstance(value, float) else value

        return {k: rounded(v) for k, v in asdict(self).items() if v not in ("", 0, None) and v == v}


@dataclass(frozen=True)
class Sizes:
    """The layer whose tokens travel."""

    hidden: int = 7168
    topk: int = 8
    experts: int = 64
    dtype: str = "bf16"

    def problem(self, T: int, small: bool = False) -> Problem:
        """Its problem with T tokens in all. I is small: nobody multiplies here."""
        H, I = (min(self.hidden, JUDGED_HIDDEN), 32) if small else (self.hidden, 1)  # noqa: E741  (the project's letter)
        return Problem(T=T, H=H, I=I, E=self.experts, K=self.topk, dtype=self.dtype)


@dataclass(frozen=True)
class Options:
    seconds: float = 0.15
    """Repeats of one candidate at one number of tokens, about."""
    deadline: float = 60.0


def measure(
    pairs: Sequence[tuple[str, RankPair]], tokens: Sequence[int], sizes: Sizes, ranks: int, transport: str, options: Options
) -> Iterator[Reading]:
    """Number of tokens by number of tokens, bare collectives first. Raises ContractError where nothing can run."""
    check(ranks > 1, f"--ranks is {ranks}; between ranks there must be at least 2")
    check(transport != "simulated", "simulated ranks are threads of one process: there is no transport to time")
    check(all(0 < T <= MOST_TOKENS for T in tokens), f"tokens {list(tokens)} must be in [1, {MOST_TOKENS}]: tags end there")
    check(sizes.hidden >= DIGITS, f"hidden={sizes.hidden} must be at least {DIGITS}: a tag needs so many columns")
    check(options.seconds > 0, f"seconds={options.seconds:g} must be above 0")
    for layout in ("standard", "batched"):
        full_size(sizes.problem(ranks), ranks, layout)  # for its refusals, before any process starts
    # Recording costs tens of microseconds a collective: `verify` compares collectives, this times them.
    with RankPool(ranks, transport, deadline=options.deadline, record=False) as pool:
        session = RankSession(ranks, transport, options.deadline, pool)
        verdicts: dict[tuple[str, Case], Verdict] = {}
        for T in tokens:
            cases = {layout: full_size(sizes.problem(T * ranks), ranks, layout) for layout in ("standard", "batched")}
            for kind in anchors(transport):
                yield _raw(pool, kind, cases["standard"], T, options)
            for name, pair in pairs:
                small = sizes.problem(min(T, JUDGED_TOKENS) * ranks, small=True)
                judged = Case(replace(small, layout=pair.layout), values="sat", ranks=ranks)
                if (name, judged) not in verdicts:
                    verdicts[name, judged] = session.judge(name, pair, judged)
                head = Reading(pair.name, transport, ranks, T, str(cases[pair.layout]), str(judged))
                yield _pair(pool, session, name, pair, cases[pair.layout], verdicts[name, judged], head, options)


def anchors(transport: str) -> list[str]:
    """Bare collectives of this transport. gloo's own on GPU tensors go through the hosts: no measure of symmetric memory."""
    return [kind for kind in RAW if ("symmetric" in kind) == (transport == "symm")]


def _raw(pool: RankPool, kind: str, case: Case, T: int, options: Options) -> Reading:
    head = Reading(kind, pool.transport, case.ranks, T, str(case))
    load, p = Load(case), case.problem
    there = back = (busiest(load.slot_rows() if "slot" in kind else load.token_rows())) * p.H * p.fmt.dtype.itemsize
    if "gather" in kind:
        rows = (case.ranks - 1) * case.world.max_tokens * p.H
        there, back = rows * p.fmt.dtype.itemsize, rows * 4
    return read(head, pool.run(time_raw, kind, str(case), options.seconds), there, back)


def _pair(
    pool: RankPool,
    session: RankSession,
    name: str,
    pair: RankPair,
    case: Case,
    verdict: Verdict,
    head: Reading,
    options: Options,
) -> Reading:
    """The reading of a pair that has this verdict."""
    if verdict.outcome is Outcome.UNSUPPORTED:
        return replace(head, reason=verdict.reason)
    if reason := support(pair, case.world, pool.transport):
        return replace(head, reason=reason)
    if verdict.outcome is not Outcome.PASS:
        words = verdict.findings[0] if verdict.findings else verdict.reason
        wrong = "wrong: " if verdict.outcome is Outcome.FAIL else ""
        return replace(head, reason=f"{wrong}{verdict.outcome.name} on {head.judged}: {words}")
    if (failed := session.load(name)) is not None:  # new ranks, if the last candidate broke the pool
        return replace(head, reason=failed.headline)
    needed = Load(case).must_move()
    return read(head, pool.run(time_pair, name, str(case), options.seconds), needed, needed)


def read(head: Reading, run: RankRun, there: int, back: int) -> Reading:
    """The reading of what every rank sampled."""
    if not run.ok:
        return replace(head, reason=run.headline)
    every: tuple[Samples, ...] = run.results
    if found := [words for samples in every for words in samples.findings]:
        return replace(head, reason=f"wrong: {found[0]}")
    called, first = _phases([s.called for s in every], there, back), every[0].called
    assert called is not None and first is not None, "nothing is wrong, so there are times"
    return replace(
        head,
        **vars(called),
        tokens_per_s=head.ranks * head.T / called.both.us * 1e6,
        replayed=_phases([s.replayed for s in every], there, back),
        dispatch_bytes=there,
        combine_bytes=back,
        repeats=len(first.both),
    )


def _phases(every: Sequence[Laps | None], there: int, back: int) -> Phases | None:
    laps = [rank for rank in every if rank is not None]
    if not laps:
        return None
    dispatch, combine, both = ([getattr(rank, name) for rank in laps] for name in ("dispatch", "combine", "both"))
    return Phases(_phase(dispatch, there), _phase(combine, back), _phase(both, there + back))


def _phase(by_rank: Sequence[Sequence[float]], moved: int) -> Phase:
    slowest = [max(turn) for turn in zip(*by_rank, strict=True)]
    us = statistics.median(slowest)
    return Phase(us, min(slowest), max(slowest), moved / (us * 1e3))
