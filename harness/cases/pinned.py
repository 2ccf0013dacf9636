"""The exact probe of quantised schemes: amax pinned at the format's maximum, so that every scale is a power of two.

In every scale group of a matrix's columns, position

    0   the weight is pinned and the input is 0        1   the input is pinned and the weight is 0
    2   the upper pin of a zero-point group, input 0   3, 4, 5   the input is +1: what pins h is made from these
    6.. the input is +-1, the weight sparse: what the sums are made of

so a pin sets a scale and enters no sum. A group's pin is P(format) times its ordinary values, with P the odd part of the
format's maximum; gates are multiples of 128, so that silu and gelu are exact (docs/tolerances.md 7.2). Tokens, channels,
experts and groups still differ by powers of two: a scale read from the wrong place is wrong by a factor, and nothing rounds.
"""

from __future__ import annotations

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.recipes import place
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL, Quantiser

Tensor = torch.Tensor
PIN = {"e4m3fn": 7, "e3m2": 7, "e2m3": 15, "e2m1": 3, "int8": 127, "int4": 8, "uint4": 15}
"""P: the pin in units of an ordinary value. P units are the format's maximum (8 stands for int4's -8)."""
GATE = 2.0**7
GROUP_BINADES = 8
NVFP4_BLOCKS = 448.0 * 6.0
"""amax of a tensor in units of its global scale: the one block that sets it."""


def _step(*quantisers: Quantiser | None) -> int:
    """Distance of pins along the columns: the smallest group of either operand, ALL where none is cut."""
    return min((q.group[1] for q in quantisers if q is not None and q.group[1] != ALL), default=ALL)


def _position(cols: int, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(position in its group, group) of each column."""
    index = torch.arange(cols, device=device)
    return (index, torch.zeros_like(index)) if step == ALL else (index % step, index // step)


def _group_factor(a: Quantiser | None, w: Quantiser, group: Tensor) -> Tensor:
    """Power of two of each column that the activations carry and the weights take back, where both have groups."""
    cut = w.group[1] != ALL and (a is None or a.group[1] != ALL)
    return 2.0 ** (group * 5 % GROUP_BINADES if cut else group * 0).double()


def _uniform_rows(p: Problem) -> bool:
    """One scale for the whole of x or h: tokens cannot differ without leaving the codes."""
    return any(q is not None and q.group == (ALL, ALL) for q in (p.quant.a1, p.quant.a2))


def token_exponents(p: Problem, s: Stream) -> Tensor:
    """int64 (T,): 9 binades; 3 under a two-level scale, whose blocks have only e4m3's range; none under one scale."""
    two_level = p.quant.a1 is not None and p.quant.a1.two_level
    high = 1 if _uniform_rows(p) else 3 if two_level else 9
    return s.integers(0, high, p.T)


def pinned_x(p: Problem, s: Stream) -> Tensor:
    a1, w = p.quant.a1, p.quant.w
    assert w is not None
    position, group = _position(p.H, _step(a1, w), s.device)
    x = s.integers(0, 2, p.T, p.H).double() * 2 - 1
    x = torch.where(position < 6, 1.0, x)
    x = torch.where((position == 0) | (position == 2), 0.0, x)
    x = torch.where(position == 1, 0.0 if a1 is None else float(PIN[a1.fmt]), x)
    return x * _group_factor(a1, w, group) * 2.0 ** token_exponents(p, s).double()[:, None]


def _sparse(s: Stream, rows: int, free: Tensor, cols: int, per_row: int) -> Tensor:
    """(rows, cols): +-1 at `per_row` random columns of each row, drawn from the free ones."""
    out = torch.zeros(rows, cols, dtype=torch.float64, device=s.device)
    if free.numel():
        sign = s.integers(0, 2, rows, per_row).double() * 2 - 1
        place(out, free[s.integers(0, free.numel(), rows, per_row)], sign)
    return out


def _parts(total: int, most: int) -> list[int]:
    """`total` as a sum of at most three parts of at most `most` each."""
    parts = []
    while total:
        parts.append(min(total, most))
        total -= parts[-1]
    assert len(parts) <= 3
    return parts


def _pin_weights(w: Tensor, q: Quantiser, position: Tensor, unit: Tensor, s: Stream) -> Tensor:
    """Set the pins of weights (rows, cols) whose ordinary values are `unit` (rows, cols)."""
    pin = PIN[q.fmt] * unit
    w = torch.where(position == 1, 0.0, w)
    if q.rule == "zero_point":
        # smallest = -z, largest = 15 - z: the scale is one unit and the zero point z, another one for each row.
        z = s.integers(3, 13, w.shape[0], 1).double()
        return torch.where(position == 0, -z * unit, torch.where(position == 2, (15 - z) * unit, w))
    return torch.where(position == 0, -pin if q.rule == "signed" else pin, torch.where(position == 2, 0.0, w))


def _pin_global(w: Tensor, q: Quantiser, scale: float) -> Tensor:
    """The one block that makes a two-level weight's global scale a power of two; the rest of its row is 0."""
    if q.two_level:
        w[0] = 0.0
        w[0, 0] = NVFP4_BLOCKS * scale
    return w


def pinned_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Gate rows: one entry of +-128. Up rows: two of +-1. Column n of h is 0 at positions 0 and 2, and pinned at 1."""
    a1, a2, q = p.quant.a1, p.quant.a2, p.quant.w
    assert q is not None
    position, group = _position(cols, _step(a1, q), s.device)
    index = torch.arange(rows, device=s.device)
    half = rows // 2
    column, up = index, torch.zeros_like(index, dtype=torch.bool)
    if p.act.gated:
        column, up = (index // 2, index % 2 == 1) if p.act.interleaved else (index % half, index >= half)
    place, h_group = _position(p.act.width_in(1) and rows, _step(a2, q), s.device)
    place, h_group = place[column], h_group[column]
    free = torch.nonzero(position >= 6)[:, 0]
    w = torch.where(up[:, None], _sparse(s, rows, free, cols, 2), _sparse(s, rows, free, cols, 1))
    w[(place == 0) | (place == 2)] = 0.0
    pins = place == 1
    w[pins] = 0.0
    carries = up if p.act.gated else ~up  # where P of h comes from; the other half of a pinned column is a plain 1
    size = PIN[a2.fmt] if a2 is not None else 1
    for at, part in enumerate(_parts(size, min(size, PIN[q.fmt] - (q.fmt in ("int4", "uint4")) * 1))):
        if cols > 3 + at:
            w[pins & carries, 3 + at] = float(part)
    if cols > 3:
        w[pins & ~carries, 3] = 1.0
    # An integer tensor with one scale for all rows has no room for gate and up in different binades.
    flat = q.group == (ALL, ALL) and q.format.integer
    up_unit = torch.full_like(index, GATE, dtype=torch.float64) if flat else _group_factor(a2, q, h_group)
    unit = torch.where(up, up_unit, GATE)[:, None] / _group_factor(a1, q, group)[None]
    return _pin_global(_pin_weights(w * unit, q, position, unit, s), q, 0.5)


def pinned_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Four entries of +-1 a row, in the columns where h is neither 0 nor pinned; rows spread over 9 binades."""
    a2, q = p.quant.a2, p.quant.w
    assert q is not None
    position, group = _position(cols, _step(a2, q), s.device)
    free = torch.nonzero(position >= 3)[:, 0]
    flat = q.group == (ALL, ALL) and q.format.integer
    spread = 1 if flat else 5 if q.two_level else 9
    row = 2.0 ** s.integers(0, spread, rows).double() * 2.0**-10
    unit = row[:, None] / _group_factor(a2, q, group)[None]
    w = _sparse(s, rows, free, cols, 4)
    return _pin_global(_pin_weights(w * unit, q, position, unit, s), q, 2.0**-11)


def static_scales(p: Problem) -> tuple[float, float]:
    """(a1_scale, a2_scale of the first expert) that put the pins at the format's maximum."""
    a1, a2 = p.quant.a1, p.quant.a2
    if a1 is not None and a1.two_level:
        return (2.0**6, 2.0**9) if a1.rule == "two_level_decode" else (2.0**-6, 2.0**-9)
    assert a2 is not None
    first = PIN["e4m3fn"] / a1.format.max if a1 is not None else 1.0
    return first, GATE * PIN["e4m3fn"] / a2.format.max
