"""The Python front door: `verify(my_moe)`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import ContractError


@dataclass(frozen=True)
class Report:
    """The verdicts of one verify call. `ok` is True where something passed and nothing failed."""

    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        return exit_code(self.verdicts) == 0

    @property
    def failures(self) -> tuple[Verdict, ...]:
        return tuple(v for v in self.verdicts if v.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED))

    def __str__(self) -> str:
        counts = count(self.verdicts)
        head = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "nothing ran"
        return "\n".join([head, *(str(v) for v in self.failures)])

    def raise_for_failures(self) -> Report:
        """Raise AssertionError with every finding and replay line unless `ok`."""
        if not self.ok:
            raise AssertionError(str(self))
        return self


def count(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Number of verdicts by outcome, in the order of Outcome."""
    verdicts = list(verdicts)
    return {o.value: sum(v.outcome is o for v in verdicts) for o in Outcome}


def exit_code(verdicts: Iterable[Verdict]) -> int:
    """0 all pass, 1 a verdict failed, 3 nothing was checked."""
    counts = count(verdicts)
    good = (Outcome.PASS.value, Outcome.UNSUPPORTED.value)
    if any(n for outcome, n in counts.items() if outcome not in good):
        return 1
    return 0 if counts[Outcome.PASS.value] else 3


def run(candidates: Sequence[Candidate], cases: Iterable[Case], device: str | None = None) -> Iterator[Verdict]:
    """Every candidate on every case; case by case, so that inputs and oracle are shared."""
    for case in cases:
        for candidate in candidates:
            yield judge(candidate, case, device)


def verify(
    *candidates: object, cases: Iterable[str | Case] | None = None, tier: str = "default", device: str | None = None
) -> Report:
    """Judge callables, Candidates or seed-style Pairs.

    A callable has the usual signature (hidden_states (T, H), w1 (E, 2I, H), w2 (E, H, I), topk_weights (T, K),
    topk_ids (T, K)) -> (T, H). `cases` are case lines, or Cases; by default the tier's own. `device` is "cpu" or "cuda".
    Raises ContractError where a case line or a candidate is malformed; failures are in the Report, not raised.
    """
    if not candidates:
        raise ContractError("verify needs at least one candidate: a callable, a Candidate or a Pair")
    if modes.interpreting():
        modes.choose("interpret")
    chosen = [as_candidate(c) for c in candidates]
    if cases is None:
        drawn: list[Case] = cases_of(tier)
    else:
        drawn = [parse_case(c) if isinstance(c, str) else c for c in cases]
    return Report(tuple(run(chosen, drawn, device)))
