"""The L0 vacuity gate: which grossly wrong results this case would pass, under this candidate's bounds.

A PASS means something only where the same inputs and the same rule reject a null kernel (docs/tolerances.md, 7.1). Wrong
results that are mathematically the right one (a rolled batch of one token) are not counted.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.tokens import tokens_at
from moeproof.harness.judging.compare import null_kernels, within
from moeproof.harness.judging.expect import JUDGED, UPSTREAM, Expectation
from moeproof.harness.judging.lint import lint
from moeproof.harness.judging.rerun import SWAPPED, faults_of, rerun, swapped
from moeproof.harness.judging.trial import Trial, expectation_of
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.oracle.rounding import round_to
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
FEW = 16
"""Tokens looked at first: what is wrong in all rows is nearly always seen in these."""
SAME = 2.0**-40
"""float64 results this close (relative to the row's largest) are the same result."""


def blind(trial: Trial) -> list[str]:
    """Why a PASS of this trial would mean nothing, in words; empty where it means something.

    Either a grossly wrong result would pass, or the inputs hide what the case is there to see (lint).
    """
    shown = tuple((n, trial.shown[n].dtype) for n in JUDGED if n in trial.shown)
    return blind_case(trial.case, trial.candidate.claims, shown, trial.home)


def blind_case(case: Case, claims: Claims, shown: Sequence[tuple[str, torch.dtype]], device: str = "cpu") -> list[str]:
    """The same for whoever showed these tensors in these dtypes on the case."""
    return list(_blind(case, device, claims, tuple(shown)))


@functools.lru_cache(maxsize=64)
def _blind(case: Case, device: str, claims: Claims, shown: tuple[tuple[str, torch.dtype], ...]) -> tuple[str, ...]:
    """Worked out once for all candidates that claim and show the same."""
    reasons = blind_spots(expectation_of(case, device, claims), shown)
    return (*reasons, *lint(case, device, claims))


def blind_spots(expect: Expectation, shown: Sequence[tuple[str, torch.dtype]]) -> list[str]:
    """The same of any expectation, from what a perfect candidate would show of these tensors in these dtypes."""
    perfect = {name: _perfect(expect.chained(name), dtype) for name, dtype in shown}
    spots = []
    for name, _ in shown:
        accepted = accepts(name, perfect, expect)
        if accepted:
            spots.append(f"{name} would pass for {', '.join(accepted)}")
    return spots


def _perfect(value: Value, dtype: torch.dtype) -> Tensor:
    return round_to(value.value, format_of(dtype)).to(dtype)


def accepts(name: str, shown: Mapping[str, Tensor], expect: Expectation) -> list[str]:
    """The wrong results of tensor `name` that every element's bound accepts."""
    want = expect.value(name, shown)
    tokens = want.value.shape[0]
    undecided: list[str] = []
    # A scale that is one for all tokens is another for a few of them.
    few = tokens if expect.inputs.problem.quant.quantised else min(FEW, tokens)
    for count in dict.fromkeys((few, tokens)):
        part = _first(want, count)
        undecided = [
            kind
            for kind, wrong in wrong_results(name, part, shown, expect, count, undecided)
            if not _told_apart(wrong, part) and (count < tokens or differs(wrong, part))
        ]
        if not undecided:
            break
    return undecided


def wrong_results(
    name: str, want: Value, shown: Mapping[str, Tensor], expect: Expectation, tokens: int, kinds: Collection[str] = ()
) -> Iterator[tuple[str, Tensor]]:
    """(kind, float64 tensor) of the first tokens: the value scaled, negated, rolled and disturbed, and the stages run
    again with a fault, as far as they lie between what is shown and `name`. All of them, or those of the given kinds.
    """
    for kind, wrong in null_kernels(want.value, expect.noise(name, shown)).items():
        if not kinds or kind in kinds:
            yield kind, wrong
    p = expect.inputs.problem
    if name == "gate_up" and p.act.gated and (not kinds or SWAPPED in kinds):
        yield SWAPPED, swapped(want.value, p)
    inputs = tokens_at(expect.inputs, torch.arange(tokens, device=expect.inputs.device))
    upstream = next((n for n in UPSTREAM[name] if n in shown), None)
    first = JUDGED.index(upstream) + 1 if upstream else 0
    for kind, fault in faults_of(p).items():
        if first <= JUDGED.index(fault.breaks) <= JUDGED.index(name) and (not kinds or kind in kinds):
            start = input_of(fault.breaks, upstream, shown, expect)[:tokens]
            yield kind, rerun(name, fault, start, inputs, expect.claims)


def input_of(broken: str, upstream: str | None, shown: Mapping[str, Tensor], expect: Expectation) -> Tensor:
    """What the broken stage works on: what the candidate showed, or the oracle's own tensor."""
    before = JUDGED[: JUDGED.index(broken)]
    if not before:
        return expect.inputs.hidden_states
    return shown[upstream] if upstream == before[-1] else expect.chained(before[-1]).value


def _usable(wrong: Tensor, want: Value) -> Tensor:
    """bool: elements that prove something. Rolling and dead slots bring in rows that do not exist."""
    usable = want.value.isfinite() & wrong.isfinite()
    return usable & want.live.unsqueeze(-1) if want.live is not None else usable


def _told_apart(wrong: Tensor, want: Value) -> bool:
    """Some element's bound rejects the wrong result."""
    return bool((~within(wrong, want) & _usable(wrong, want)).any())


def differs(wrong: Tensor, want: Value) -> bool:
    """The wrong result is another one, beyond the noise of float64."""
    scale = want.value.abs().nan_to_num(posinf=0.0).amax(dim=-1, keepdim=True) if want.value.numel() else want.value
    return bool((((wrong - want.value).abs() > SAME * scale) & _usable(wrong, want)).any())


def _first(want: Value, count: int) -> Value:
    cut = {f: None if (t := getattr(want, f)) is None else t[:count] for f in ("value", "bound", "live", "error")}
    return replace(want, **cut)  # type: ignore[arg-type]
