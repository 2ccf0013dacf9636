"""The misrounding count (docs/tolerances.md, 7.4): how many stored elements are not the exact result's own rounding.

An error e before the final rounding moves a result across a rounding boundary with probability |e| / ulp, for results
spread over an ulp. The mean of |e| is at most its root mean square r, which a product's derivation gives
(reference/oracle/typical.py). Where only the bound A is known, 2 A stands for r: an error that knows where boundaries are moves
what lies within A on either side. Over n elements that is E = sum min(1, r / ulp), and a healthy count stays below
E + 6 sqrt(E) + 6. An element whose exact result lies on a boundary, or so near that one float32 rounding puts it there, may go
either way: it counts as 1.

Beside the elementwise bound this is about the whole: a systematic push across boundaries, each step allowed, adds up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from moeproof.harness.judging.compare import Comparison
from moeproof.harness.judging.expect import Shown
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.schemes import Format
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.bounds import U32
from moeproof.reference.oracle.rounding import round_to, ulp
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
GROUP = 16
"""Columns that are counted together: what one lane or fragment of a kernel writes."""


def counted(judged: Comparison, name: str, got: Tensor, want: Value) -> Comparison:
    """The comparison, with the misrounding count where every element is within its bound."""
    return judged if judged.findings else replace(judged, findings=tuple(count_misrounded({name: got}, {name: want})))


def count_misrounded(shown: Shown, values: Mapping[str, Value]) -> list[Finding]:
    """A finding for each 16-bit tensor with more misroundings, in all, in a row or in 16 columns, than A explains."""
    findings = []
    for name, want in values.items():
        if want.fmt is not None and want.fmt.name in ("bf16", "fp16"):
            findings += misrounded(name, shown[name].double(), want, want.fmt)
    return findings


def misrounded(name: str, got: Tensor, want: Value, fmt: Format) -> list[Finding]:
    """The first group of elements (all, a row, 16 columns) in which more are misrounded than expected."""
    if want.error is None or not got.numel():
        return []
    exact, step = want.value, ulp(want.value, fmt)
    counted = exact.isfinite() & got.isfinite()
    if want.live is not None:
        counted &= want.live.unsqueeze(-1)
    wrong = (got != round_to(exact, fmt)) & counted
    if int(wrong.sum()) <= float(allowance(torch.zeros(()))):
        return []  # below what is allowed where nothing is expected
    expected = torch.where(counted, chance(exact, size(want.error, want.typical and want.typical()), step), 0.0)
    rows, columns = exact.reshape(-1, exact.shape[-1]).shape
    wrong, expected = wrong.view(rows, columns), expected.view(rows, columns)
    pad = -columns % GROUP
    strips = [torch.nn.functional.pad(t.double(), (0, pad)).view(rows, -1, GROUP).sum(dim=(0, 2)) for t in (wrong, expected)]
    for where, count, mean in (
        ("", wrong.sum()[None], expected.sum()[None]),
        ("row", wrong.sum(dim=1), expected.sum(dim=1) + 1),
        (f"{GROUP} columns from", strips[0], strips[1] + 1),
    ):
        over = count.double() - allowance(mean)
        if bool((over > 0).any()):
            at = int(over.argmax())
            return [_finding(name, where, at, int(count[at]), float(mean[at]), got, want, wrong.view_as(exact))]
    return []


def size(error: Tensor, typical: Tensor | None) -> Tensor:
    """How large an error is expected before the final rounding: its root mean square, at most twice its bound."""
    return 2 * error if typical is None else torch.minimum(2 * error, typical.nan_to_num(nan=torch.inf, posinf=torch.inf))


def chance(exact: Tensor, size: Tensor, step: Tensor) -> Tensor:
    """Probability that an element of this exact value, size of error and ulp is rounded the wrong way, at most."""
    # Distance to the nearest boundary, half-way between two neighbours.
    boundary = (torch.remainder(exact.abs() / step, 1.0) - 0.5).abs() * step
    either_way = boundary <= 2 * U32 * exact.abs()
    return torch.where(either_way, 1.0, (size / step).clamp(max=1.0))


def allowance(expected: Tensor) -> Tensor:
    """E + 6 sqrt(E) + 6: six standard deviations of a sum of rare events, and six for small E."""
    return expected + 6 * expected.sqrt() + 6


def _finding(name: str, where: str, at: int, count: int, mean: float, got: Tensor, want: Value, wrong: Tensor) -> Finding:
    if where.endswith("from"):
        group = f" in {where} {at * GROUP}"
    elif where:
        slots = want.value.shape[1] if want.value.dim() == 3 else 1
        group = f" in token {at // slots}" + (f", slot {at % slots}" if want.value.dim() == 3 else "")
    else:
        group = ""
    smaller = int((wrong & (got.abs() < want.value.abs())).sum())
    lean = f"; {smaller} of {int(wrong.sum())} toward zero"
    limit = mean + 6 * math.sqrt(mean) + 6
    words = f"{count} elements{group} are not the exact result's own rounding, at most {limit:.0f} are expected{lean}"
    return Finding(TENSORS[name], name, words, bad=int(wrong.sum()), total=wrong.numel())
