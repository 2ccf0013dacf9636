"""A candidate's tensor against the oracle's Value: element by element, never averaged."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.harness.judging.pattern import describe
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.overflow import half_step, may_be_infinite
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor


@dataclass(frozen=True)
class Comparison:
    findings: tuple[Finding, ...]
    checked: int
    ratio: float
    """Largest observed/allowed error over elements with a bound."""


def within(got: Tensor, want: Value) -> Tensor:
    """bool: which elements are acceptable. `got` float64."""
    assert want.bound is not None
    value = want.value
    ok = (got - value).abs() <= want.bound
    ok |= (got == value) | free(want)
    if want.fmt is not None:
        # Half an ulp of a bound is the rounding's own.
        infinite = may_be_infinite(value, want.bound - half_step(want.fmt), want.fmt)
        ok |= infinite & got.isinf() & (got.sign() == value.sign())
    return ok


def free(want: Value) -> Tensor:
    """bool: finite elements that may be anything, NaN included: float32 may leave its range on the way to them."""
    assert want.bound is not None
    return want.bound.isinf() & want.value.isfinite()


def compare(name: str, got: Tensor, want: Value, experts: Tensor | None = None, halves: str = "") -> Comparison:
    """Judge one tensor in canonical coordinates, leaving out rows that are not live and what an upstream fault made NaN.

    `experts` and `halves` only serve to say where errors sit, see pattern.describe.
    """
    exact = got.double()
    bound = torch.zeros_like(want.value) if want.bound is None else want.bound
    value = Value(want.value, bound, want.live, want.fmt)
    comparable = (value.value.isfinite() | value.value.isinf()) & ~free(value)
    if want.live is not None:
        comparable = comparable & want.live.unsqueeze(-1)
    bad = comparable & ~within(exact, value)
    checked = int(comparable.sum())
    error = (exact - value.value).abs()
    ratio = torch.where(comparable & (bound > 0) & error.isfinite(), error / bound, 0.0)
    worst = float(ratio.max()) if ratio.numel() else 0.0
    if not bool(bad.any()):
        return Comparison((), checked, worst)
    return Comparison((_finding(name, exact, value, bad, checked, experts, halves),), checked, worst)


def _finding(name: str, got: Tensor, want: Value, bad: Tensor, total: int, experts: Tensor | None, halves: str) -> Finding:
    assert want.bound is not None
    # The worst element: NaN first, then the largest error relative to what is allowed.
    excess = (got - want.value).abs() / (want.bound + want.value.abs() * 2.0**-60 + 2.0**-200)
    excess = torch.where(bad, excess.nan_to_num(nan=torch.inf, posinf=torch.inf), -1.0)
    flat = int(excess.argmax())
    where = [int(i) for i in torch.unravel_index(torch.tensor(flat), bad.shape)]
    token, column = where[0], where[-1]
    slot = where[1] if bad.dim() == 3 else None
    expert = int(experts[token, slot]) if experts is not None and slot is not None else None
    at = tuple(where)
    value = float(got[at])
    problem = "not a number" if value != value else "wrong value" if float(want.bound[at]) else "not exact"
    return Finding(
        stage=TENSORS[name],
        tensor=name,
        message=problem,
        token=token,
        slot=slot,
        expert=expert,
        column=column,
        got=value,
        want=float(want.value[at]),
        allowed=float(want.bound[at]),
        bad=int(bad.sum()),
        total=total,
        pattern=describe(bad, experts, halves),
    )


def compare_bits(
    name: str, got: Tensor, want: Tensor, relevant: Tensor | None = None, experts: Tensor | None = None
) -> Comparison:
    """Judge stored codes or scales bit for bit, one element per code. `relevant` bool (of want's shape, or broadcastable).

    Both uint8 codes, or of one floating dtype. Codes are compared, not what they decode to: -0 is not +0.
    """
    a, b = (_integer_view(t) for t in (got, want))
    bad = a != b
    if relevant is not None:
        bad, total = bad & relevant, int(relevant.expand_as(bad).sum())
    else:
        total = bad.numel()
    if not bool(bad.any()):
        return Comparison((), total, 0.0)
    where = [int(i) for i in bad.nonzero()[0]]
    token, slot = where[0], where[1] if bad.dim() == 3 else None
    at = tuple(where)
    finding = Finding(
        stage=TENSORS[name],
        tensor=name,
        message="other bits" if got.is_floating_point() else "other code",
        token=token,
        slot=slot,
        expert=None if experts is None or slot is None or experts.shape != bad.shape[:2] else int(experts[token, slot]),
        column=where[-1],
        got=float(got[at]),
        want=float(want[at]),
        allowed=0.0,
        bad=int(bad.sum()),
        total=total,
        pattern=describe(bad, experts if experts is not None and experts.shape == bad.shape[:2] else None),
    )
    return Comparison((finding,), total, 0.0)


def _integer_view(t: Tensor) -> Tensor:
    """The same bits as integers, so that NaN equals itself."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def null_kernels(value: Tensor, noise: float = 0.1) -> dict[str, Tensor]:
    """Grossly wrong results that any useful rule must reject, made from the right one (docs/tolerances.md)."""
    alternate = 1.0 - 2.0 * (torch.arange(value.shape[-1], device=value.device) % 2)
    return {
        "zeros": torch.zeros_like(value),
        "half": value * 0.5,
        "a quarter more": value * 1.25,
        "negated": -value,
        "rows rolled by one": value.roll(1, 0),
        f"{noise:.0%} noise": value * (1.0 + noise * alternate),
    }
