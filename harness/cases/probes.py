"""Value recipes that look for one kind of fault each: identity, width of the accumulator, cancellation, clamps, tails.

Like the recipes of recipes.py each is exact arithmetic on generator words. `expert` is the global id of the weights' owner.
"""

from __future__ import annotations

import math

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.recipes import normal_w1, normal_w2, normal_x
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle.activations import GATED, UNGATED

Tensor = torch.Tensor


def _where_gate(p: Problem, rows: int, gate: Tensor, up: Tensor) -> Tensor:
    """(rows, cols): gate rows and up rows in the packing of the activation."""
    if not p.act.gated:
        return gate
    index = torch.arange(rows, device=gate.device)
    is_gate = index % 2 == 0 if p.act.interleaved else index < rows // 2
    return torch.where(is_gate[:, None], gate, up)


def _order(p: Problem, rows: int, device: torch.device) -> Tensor:
    """int64 (rows,): position of each row of w1 within its half."""
    index = torch.arange(rows, device=device)
    if not p.act.gated:
        return index
    return index // 2 if p.act.interleaved else index % (rows // 2)


def _pick(columns: Tensor, cols: int, value: float) -> Tensor:
    """(rows, cols): `value` at one column of each row, zero elsewhere."""
    out = torch.zeros(columns.numel(), cols, dtype=torch.float64, device=columns.device)
    return out.scatter_(1, columns[:, None] % cols, value)


# tagged: who is who


def tagged_x(p: Problem, s: Stream) -> Tensor:
    """Column 0 is 1; the next ones are the bits of the token's number as -1 and 1; the rest are random signs."""
    x = 1.0 - 2.0 * s.integers(0, 2, p.T, p.H).double()
    bits = min(max(p.T - 1, 1).bit_length(), p.H - 1)
    token = torch.arange(p.T, device=s.device)
    for bit in range(bits):
        x[:, 1 + bit] = 2.0 * ((token >> bit) & 1).double() - 1.0
    x[:, 0] = 1.0
    return x


def tagged_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """Gate 128 whatever the token, so that silu and gelu hand the up row on: x's column j, exactly.

    Ungated, the row is 128 + 64 x_j, which is saturated as well.
    """
    j = _order(p, rows, s.device)
    gate = _pick(torch.zeros_like(j), cols, 128.0)
    if not p.act.gated:
        return gate + _pick(j, cols, 64.0) * (j % cols != 0)[:, None]
    return _where_gate(p, rows, gate, _pick(j, cols, 1.0))


def tagged_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """y_i = x_i + 4 * (bit i of the expert's number): one column says who the token is, and by whom it was done."""
    i = torch.arange(rows, device=s.device)
    bits = max(p.weight_experts - 1, 1).bit_length()
    bit = ((expert >> (i % bits)) & 1).double()
    unit = 2.0**-7 if p.act.gated else 2.0**-6
    return _pick(i, cols, unit) + _pick(torch.zeros_like(i), cols, 4 * unit) * bit[:, None]


# wide: sums that need 12 to 17 bits


def wide_x(p: Problem, s: Stream) -> Tensor:
    """Positive integers of 4 bits; in fp32 odd ones of 12, which tf32 would round."""
    if p.dtype == "fp32":
        return (2 * s.integers(1024, 2048, p.T, p.H) + 1).double() * 2.0**-8
    return s.integers(1, 16, p.T, p.H).double()


def wide_w(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """Integers 1..15 with one sign a row, so that nothing cancels: the sum of n products needs 6 + log2(n) bits."""
    sign = 1.0 - 2.0 * s.integers(0, 2, rows, 1).double()
    return s.integers(1, 16, rows, cols).double() * sign * 2.0 ** -round(math.log2(64 * cols))


# cancel: slots that all but cancel


def cancel_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """Experts 2i and 2i+1 draw from one stream: every second column of y is the other's negative, the rest is their own."""
    base, other = normal_w2(p, s, rows, cols), normal_w2(p, s, rows, cols)
    if expert % 2 == 0:
        return base
    cancels = (torch.arange(rows, device=s.device) % 2 == 0)[:, None]
    return torch.where(cancels, -base, other)


# asym: no two rows, columns, tokens or experts alike in scale


def _ramp(n: int, device: torch.device) -> Tensor:
    """(n,) from 3/4 to 5/4."""
    return 0.75 + 0.5 * torch.arange(n, dtype=torch.float64, device=device) / max(n - 1, 1)


def asym_x(p: Problem, s: Stream) -> Tensor:
    return normal_x(p, s) * _ramp(p.T, s.device)[:, None] * _ramp(p.H, s.device)


def _asym(w: Tensor, expert: int) -> Tensor:
    gain = (0.7, 1.0, 1.3)[expert % 3]
    return w * _ramp(w.shape[0], w.device)[:, None] * _ramp(w.shape[1], w.device).flip(0) * gain


def asym_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    return _asym(normal_w1(p, s, rows, cols), expert)


def asym_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    return _asym(normal_w2(p, s, rows, cols), expert)


# clamp and tail: where activations differ most


def clamp_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """Pre-activations of twice the limit on average, up to seven times, on both sides."""
    return normal_w1(p, s, rows, cols) * 4.0


def tail_x(p: Problem, s: Stream) -> Tensor:
    x = normal_x(p, s)
    x[:, 0] = 1.0
    return x


def tail_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """Gates of -3.5 +- 0.25: there erf and tanh gelu differ by a quarter, and 1 + erf has lost its bits."""
    gate = s.normal(rows, cols) * (0.25 / math.sqrt(cols))
    gate[:, 0] = -3.5
    return _where_gate(p, rows, gate, normal_w1(p, s, rows, cols))


def tail_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    return normal_w2(p, s, rows, cols) * 2.0**10


# sweep: every bit pattern of a 16-bit gate

FLUSHED = 2.0**-100
"""Gates whose result is smaller are left out (0 in their place): float32 products of them may be subnormal, and flushed."""
UPS = (1.0, -0.75)
"""The up halves of the sweep. At most 1 in size, so that no product leaves the format."""


SCATTER = 40503
"""Odd, so that i * SCATTER mod 2^16 visits every pattern once, and any few tokens see all magnitudes."""


def patterns(fmt: Format, count: int, device: torch.device) -> Tensor:
    """float64 (count,): the values of the 16-bit patterns 0, 40503, 81006, .. modulo 2^16.

    1 stands for NaN and infinity, which would make every sum of their row NaN.
    """
    index = torch.arange(count, device=device) * SCATTER % 2**16
    value = index.to(torch.int32).to(torch.int16).view(fmt.dtype).double()
    return torch.where(value.isfinite(), value, 1.0)


def sweep_x(p: Problem, s: Stream) -> Tensor:
    """(T, H): the gates of token t in the first I columns, its up value in column H - 1."""
    gates = patterns(p.fmt, p.T * p.I, s.device).view(p.T, p.I)
    if p.act.name == "relu2_no_mul":
        gates = gates.clamp(-(p.fmt.max**0.5), p.fmt.max**0.5)  # its square must be finite
    turn = torch.arange(p.T, device=s.device) * p.I // 2**16 % len(UPS)
    ups = torch.tensor(UPS, dtype=torch.float64, device=s.device)[turn]
    result = GATED[p.act.name](gates, ups[:, None], p.act) if p.act.gated else UNGATED[p.act.name](gates)
    x = torch.zeros(p.T, p.H, dtype=torch.float64, device=s.device)
    x[:, : p.I] = torch.where(result.abs() < FLUSHED, 0.0, gates)
    if p.act.gated:
        x[:, p.H - 1] = ups
    return x


def sweep_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """One 1 in each row: gate j is x's column j, every up is x's last column."""
    j = _order(p, rows, s.device)
    return _where_gate(p, rows, _pick(j, cols, 1.0), _pick(torch.full_like(j, cols - 1), cols, 1.0))


def sweep_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """y's columns are h's."""
    return _pick(torch.arange(rows, device=s.device), cols, 1.0)
