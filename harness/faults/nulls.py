"""Null kernels: what computes nothing of the layer, and which acceptance rules take it for right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.faults.grounds import inputs_once
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.chain import chain

Tensor = torch.Tensor
Null = Callable[[Inputs, Tensor], Tensor]
"""(inputs, right result float64 (T, H)) -> float64 (T, H)."""


def _noise(inputs: Inputs, want: Tensor) -> Tensor:
    rms = want.square().mean().sqrt() if want.numel() else 1.0
    return Stream(1, "null").normal(*want.shape) * rms


NULLS: dict[str, Null] = {
    "zeros": lambda inputs, want: torch.zeros_like(want),
    "copy of the input": lambda inputs, want: inputs.hidden_states.double(),
    "mean over the tokens": lambda inputs, want: want.mean(0, keepdim=True).expand_as(want),
    "random normals": _noise,
    "half": lambda inputs, want: want * 0.5,
    "a quarter more": lambda inputs, want: want * 1.25,
    "negated": lambda inputs, want: -want,
    "rows rolled by one": lambda inputs, want: want.roll(1, 0),
}
"""The first reads nothing, the next three no weights; the others know the right result and spoil it."""


@dataclass(frozen=True)
class Taken:
    """One policy: the null kernels that it accepts; `cases` is how many it was asked about each of them."""

    policy: str
    cases: int
    accepted: tuple[str, ...]


def ours(cases: Sequence[Case]) -> Taken:
    """Our own judge on null kernels that show only their output: accepted where any case PASSes.

    Cases in which the null kernel's result is the right one (zeros of a batch without routes) are not asked.
    """
    asked, accepted = 0, []
    for name, null in NULLS.items():
        wrong = [verdict for case in cases if (verdict := _verdict(null, case)) is not None]
        asked = max(asked, len(wrong))
        if Outcome.PASS in wrong:
            accepted.append(name)
    return Taken("moeproof", asked, tuple(accepted))


def _verdict(null: Null, case: Case) -> Outcome | None:
    """None where its result is right, to a unit in the last place of the output."""
    inputs = inputs_once(case)
    want = chain(inputs, Claims())["out"].value
    result = null(inputs, want).to(case.problem.fmt.dtype)
    if bool(((result.double() - want).abs() <= 2 * case.problem.fmt.unit * want.abs()).all()):
        return None

    def run(given: Inputs) -> Tensor:
        return given.hidden_states.copy_(result) if case.problem.inplace else result.clone()

    return judge(Candidate("null", run), case, "cpu").outcome


def accepted_by(accept: Callable[[Tensor], bool], inputs: Inputs, want: Tensor) -> tuple[str, ...]:
    """The null kernels that a rule accepts in place of `want`."""
    return tuple(name for name, null in NULLS.items() if accept(null(inputs, want).to(inputs.problem.fmt.dtype).double()))
