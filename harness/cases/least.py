"""The exact probe of e8m0 scales at their lower end: groups whose stored scale is code 0, which means 2^-127 and not 0.

e8m0 has no zero (OCP MX 1.0 section 5.4.1), but whoever builds a float32 from a code by shifting it into the exponent field
makes 0 of code 0. Columns come in groups of 32, of three kinds in turn:

    0   gates: x is +-1, the weight +-128, so that silu and gelu are exact
    1   x is as faint as its format's scale goes, and the up weight as large as it takes to make 1 of it
    2   the weight is as faint, and x as large

so up values are -2 .. 2. w2 has ordinary groups, and faint ones that rows of odd number are made of alone. Every value is a
power of two, every sum a few of them: nothing rounds. The codes of a faint operand times the other's values are 2^127.
"""

from __future__ import annotations

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.recipes import place
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import Quantiser

Tensor = torch.Tensor
GROUP = 32
GATE = 2.0**7


def least(q: Quantiser) -> float:
    """The power of two whose group gets e8m0's least scale, 2^-127, under either rule for it."""
    return 2.0 ** (q.format.emax - 127)


def sizes(p: Problem) -> tuple[tuple[float, float, float], tuple[float, float]]:
    """(x by kind of column, up weights of kinds 1 and 2)."""
    a1, w = p.quant.a1, p.quant.w
    assert w is not None
    faint = 1.0 if a1 is None else least(a1)
    return (1.0, faint, 1 / least(w)), (1 / faint, least(w))


def _kinds(cols: int, device: torch.device) -> Tensor:
    return torch.arange(cols, device=device) // GROUP % 3


def _drawn(s: Stream, out: Tensor, columns: Tensor, size: float) -> None:
    """One +-size in each row of `out`, at one of `columns`."""
    if columns.numel():
        sign = s.integers(0, 2, out.shape[0], 1).double() * 2 - 1
        place(out, columns[s.integers(0, columns.numel(), out.shape[0], 1)], sign * size)


def least_x(p: Problem, s: Stream) -> Tensor:
    sign = s.integers(0, 2, p.T, p.H).double() * 2 - 1
    return sign * torch.tensor(sizes(p)[0], dtype=torch.float64, device=s.device)[_kinds(p.H, s.device)]


def least_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Gate rows: one entry of kind 0. Up rows: one each of kinds 1 and 2."""
    kinds, index = _kinds(cols, s.device), torch.arange(rows, device=s.device)
    of_kind = [torch.nonzero(kinds == kind)[:, 0] for kind in range(3)]
    gate, up = (torch.zeros(rows, cols, dtype=torch.float64, device=s.device) for _ in range(2))
    _drawn(s, gate, of_kind[0], GATE)
    for columns, size in zip(of_kind[1:], sizes(p)[1], strict=True):
        _drawn(s, up, columns, size)
    is_up = index % 2 == 1 if p.act.interleaved else index >= rows // 2
    return torch.where(is_up[:, None], up, gate)


def least_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Even rows: two entries outside kind 1, for a y near 1. Odd rows: one faint entry of kind 1."""
    q = p.quant.w
    assert q is not None
    kinds = _kinds(cols, s.device)
    ordinary, faint = (torch.zeros(rows, cols, dtype=torch.float64, device=s.device) for _ in range(2))
    for _ in range(2):
        _drawn(s, ordinary, torch.nonzero(kinds != 1)[:, 0], 1 / GATE)
    _drawn(s, faint, torch.nonzero(kinds == 1)[:, 0], least(q))
    odd = torch.arange(rows, device=s.device) % 2 == 1
    return torch.where(odd[:, None], faint, ordinary)
