"""What the checks look at: one candidate on one case, with its runs and the oracle's answers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.compare import Comparison
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.judging.run import Run, run_once
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.experts import live_slots
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor


SMALL = 2**27
"""Multiplications of a case whose oracle is quicker on one CPU thread than a GPU takes to launch its kernels."""


def home(case: Case, device: str) -> str:
    """Where the inputs and the oracle of a case live: the CPU for small cases, else the candidate's device."""
    p = case.problem
    work = (p.T * p.slots + len(p.local)) * (p.N + p.I) * p.hidden
    return "cpu" if work <= SMALL and not case.huge else device


@functools.lru_cache(maxsize=1)
def inputs_of(case: Case, device: str) -> Inputs:
    """One set of inputs serves all candidates of a session."""
    return make_inputs(case, device)


@functools.lru_cache(maxsize=2)
def expectation_of(case: Case, device: str, claims: Claims) -> Expectation:
    """One oracle serves all candidates with the same claims."""
    return Expectation(inputs_of(case, device), claims)


@dataclass(frozen=True)
class Ruling:
    """What a check decided. A PASS is no ruling: the next check goes on."""

    outcome: Outcome
    findings: tuple[Finding, ...] = ()
    reason: str = ""


@dataclass
class Tally:
    """What the checks compared, for the verdict's figures."""

    checked: int = 0
    worst: dict[str, float] = field(default_factory=dict)

    def add(self, checked: int, worst: Mapping[str, float] | None = None) -> None:
        self.checked += checked
        for name, ratio in (worst or {}).items():
            self.worst[name] = max(ratio, self.worst.get(name, 0.0))


@dataclass(frozen=True)
class Trial:
    """`runs` holds one run for each poison pattern, all without findings. Checks may run the candidate again."""

    candidate: Candidate
    case: Case
    device: str
    runs: tuple[Run, ...]
    tally: Tally = field(default_factory=Tally)

    @property
    def home(self) -> str:
        return home(self.case, self.device)

    @property
    def inputs(self) -> Inputs:
        return inputs_of(self.case, self.home)

    @property
    def expect(self) -> Expectation:
        return expectation_of(self.case, self.home, self.candidate.claims)

    @property
    def shown(self) -> Mapping[str, Tensor]:
        return self.runs[0].shown

    @functools.cached_property
    def _judged(self) -> tuple[dict[str, Comparison], dict[str, Value]]:
        return judge_shown(self.shown, self.expect)

    @property
    def results(self) -> Mapping[str, Comparison]:
        """The first run's tensors against the oracle."""
        return self._judged[0]

    @property
    def wanted(self) -> Mapping[str, Value]:
        """What the first run's bounded tensors had to be."""
        return self._judged[1]

    def again(self, inputs: Inputs, pattern: str) -> Run:
        """Another call of the candidate, on these inputs."""
        return run_once(self.candidate, inputs, pattern, self.device)

    def right(self, run: Run) -> Ruling | None:
        """The ruling on the values of another run of the same inputs."""
        return wrong(self, judge_shown(run.shown, self.expect)[0])


Check = Callable[[Trial], Ruling | None]


def failed(run: Run) -> Ruling | None:
    """The ruling on a run that raised or damaged something; None where it is sound."""
    if run.error:
        return Ruling(Outcome.ERROR, reason=run.error)
    return Ruling(Outcome.FAIL, run.findings) if run.findings else None


def wrong(trial: Trial, results: Mapping[str, Comparison]) -> Ruling | None:
    """The ruling on one run's comparisons; None where all are within their bounds."""
    # Facts: one shape and one dtype for each tensor, and every element.
    trial.tally.add(sum(2 + r.checked for r in results.values()), {name: r.ratio for name, r in results.items()})
    findings = tuple(f for r in results.values() for f in r.findings)
    return Ruling(Outcome.FAIL, findings) if findings else None


def differences(runs: list[Run] | tuple[Run, ...], inputs: Inputs) -> list[str]:
    """Names of tensors whose comparable elements differ between the runs, bit for bit."""
    first = runs[0].shown
    return [
        name
        for name, a in first.items()
        if any((b := run.shown.get(name)) is None or not same_bits(name, a, b, inputs) for run in runs[1:])
    ]


def same_bits(name: str, a: Tensor, b: Tensor, inputs: Inputs) -> bool:
    """Rows that do not exist (dead slots, padding) may hold anything."""
    if name in ("rows", "row_scales", "sorted_slots", "block_expert"):
        return True  # only parts of these exist; they are judged as invariants
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if name in ("gate_up", "h", "y", "hq") or (name == "hs" and a.shape[:2] == inputs.topk_ids.shape and a.dim() == 3):
        live = live_slots(inputs)
        a, b = a[live], b[live]
    # As integers of the same size: a byte view would need a last stride of 1, which a single column may lack.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.view(bits), b.view(bits)))
