"""Value recipes: how x and the weights of a case are drawn. Every recipe is exact arithmetic on generator words.

Scales are chosen so that pre-activations have an rms near 1.2 and outputs an rms near 1: there silu, gelu and swapped
halves differ, and no absolute floor can hide an error. Gate and up rows have different scales, so a swap shows.
"""

from __future__ import annotations

import math

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
GATE_GAIN, UP_GAIN = 1.25, 0.8


def _gains(p: Problem, rows: int, device: torch.device) -> Tensor:
    """(rows, 1): per-row gain of w1, gate against up, in the packing of the activation."""
    gains = torch.full((rows, 1), GATE_GAIN, dtype=torch.float64, device=device)
    if p.act.gated:
        if p.act.interleaved:
            gains[1::2] = UP_GAIN
        else:
            gains[rows // 2 :] = UP_GAIN
    return gains


def _limit_gain(p: Problem) -> float:
    """Where the activation clamps, pre-activations must pass the limit: their rms is half of it."""
    return p.act.limit / 2 if p.act.limit else 1.0


def normal_x(p: Problem, s: Stream) -> Tensor:
    return s.normal(p.T, p.H)


def normal_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return s.normal(rows, cols) * (_gains(p, rows, s.device) * (_limit_gain(p) / math.sqrt(cols)))


def normal_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return s.normal(rows, cols) * (2.0 / math.sqrt(cols) / _limit_gain(p))


def _spread(s: Stream, count: int, low: int, high: int) -> Tensor:
    """(count,) powers of two from 2^low to 2^high."""
    return 2.0 ** s.integers(low, high + 1, count).double()


def hetero_x(p: Problem, s: Stream) -> Tensor:
    return normal_x(p, s) * _spread(s, p.T, -3, 1)[:, None] * _spread(s, p.H, -3, 1)[None, :]


def hetero_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return normal_w1(p, s, rows, cols) * _spread(s, rows, -3, 1)[:, None] * _spread(s, 1, -2, 1)


def hetero_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return normal_w2(p, s, rows, cols) * _spread(s, rows, -5, 3)[:, None] * _spread(s, 1, -3, 1)


GROUP = 16
"""Columns that share a factor in the recipe `groups`: the smallest scale group of any scheme."""


def _group_factors(cols: int, device: torch.device) -> Tensor:
    """(cols,): a power of two from 2^-4 to 2^4 for every 16 columns, neighbours apart, with a root mean square of 1."""
    factor = 2.0 ** ((torch.arange(cols, device=device) // GROUP * 5 % 9) - 4).double()
    return factor / factor.square().mean().sqrt()


def groups_x(p: Problem, s: Stream) -> Tensor:
    return normal_x(p, s) * _spread(s, p.T, -4, 4)[:, None] * _group_factors(p.H, s.device)


def groups_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return normal_w1(p, s, rows, cols) * _spread(s, rows, -5, 3)[:, None] * _group_factors(cols, s.device).flip(0)


def groups_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return hetero_w2(p, s, rows, cols) * _group_factors(cols, s.device)


EXPERT_BINADES = (-4, 4, 0, -2, 2, -3, 3, -1, 1)
"""Of an expert's w1, in turn: two neighbours are 8 apart."""


def experts_w1(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """`groups`, each expert in a binade of its own: a scale of a whole expert, taken from another, is wrong by a factor."""
    return groups_w1(p, s, rows, cols) * 2.0 ** EXPERT_BINADES[expert % 9]


def experts_w2(p: Problem, s: Stream, rows: int, cols: int, expert: int) -> Tensor:
    """h follows the square of w1's factor where gates are open; w2 takes it back, so that every expert counts in the sum."""
    return groups_w2(p, s, rows, cols) * 2.0 ** (-2 * EXPERT_BINADES[expert % 9])


_LEADERS = (1.0, 1.0 - 2.0**-8, 1.0 + 2.0**-7, 1.75, 1.5, 1.75 + 2.0**-7, 1.5 + 2.0**-7)
"""amax of a block over a power of two: at it, one bf16 step below and above; at the maxima 448 and 6, and one step above."""


def _edges(values: Tensor, s: Stream) -> Tensor:
    """(rows, cols) of order one -> led by known magnitudes: the first of every 16 columns is the largest of its block."""
    rows, cols = values.shape
    row, block = torch.arange(rows, device=s.device)[:, None], torch.arange(cols, device=s.device)[None] // GROUP
    leaders = torch.tensor(_LEADERS, dtype=torch.float64, device=s.device)[(row + 2 * block) % len(_LEADERS)]
    led = torch.where(torch.arange(cols, device=s.device) % GROUP == 0, leaders.copysign(values), values.clamp(-1, 1) * 0.95)
    return torch.where((row % 7 == 3) | ((row + block) % 5 == 2), 0.0, led)


def edges_x(p: Problem, s: Stream) -> Tensor:
    return _edges(normal_x(p, s), s) * _spread(s, p.T, -4, 4)[:, None]


def edges_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    size = 2.0 ** round(math.log2(2 / math.sqrt(cols)))
    return _edges(s.normal(rows, cols), s) * size * _spread(s, rows, -4, 4)[:, None]


def edges_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    return edges_w1(p, s, rows, cols)


def ties_x(p: Problem, s: Stream) -> Tensor:
    """Values that lie exactly between two codes once their block's amax maps to the format's maximum.

    21 / 448 of an amax is the midpoint of e4m3's 20 and 22, and half of it is int8's 63.5; the scale amax / 448 itself
    rounds, so each spelling of the same formula goes its own way here. Even rows have one amax, odd rows one per block.
    """
    row, column = torch.arange(p.T, device=s.device)[:, None], torch.arange(p.H, device=s.device)[None]
    which = s.integers(0, 16, 1) + row * 5 + torch.where(row % 2 == 1, column // GROUP * 3, 0)
    amax = (33 + 2 * (which % 16)).double() / 32 * _spread(s, p.T, -4, 4)[:, None]  # 6 bits: three times it fits bf16
    place = column % GROUP
    part = torch.where(place % 4 == 1, 0.5, 21 / 448 * 2.0 ** (2 - place % 7))
    sign = s.integers(0, 2, p.T, p.H).double() * 2 - 1
    return sign * amax * torch.where(place == 0, 1.0, part)


def int_x(p: Problem, s: Stream) -> Tensor:
    return s.integers(-3, 4, p.T, p.H).double()


def int_w(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Integers -3..3 times a power of two that keeps the rms of the sum near 1."""
    return s.integers(-3, 4, rows, cols).double() * 2.0 ** -round(math.log2(4 * math.sqrt(cols)))


def _sparse(s: Stream, rows: int, cols: int, per_row: int, low: int, high: int) -> Tensor:
    """(rows, cols) with `per_row` non-zero integers in [low, high) but never 0, at random columns of each row."""
    out = torch.zeros(rows, cols, dtype=torch.float64, device=s.device)
    columns = s.integers(0, cols, rows, per_row)
    values = s.integers(low, high, rows, per_row)
    values = torch.where(values == 0, high - 1, values).double()
    return place(out, columns, values)


def place(out: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """`values` (rows, n) at `columns` (rows, n) of `out`, one column after the other: where two meet, the later one wins.

    One scatter of all would leave that open on a GPU, and the same case would have other weights there than on a CPU.
    """
    for n in range(columns.shape[1]):
        out.scatter_(1, columns[:, n : n + 1], values[:, n : n + 1])
    return out


def sat_x(p: Problem, s: Stream) -> Tensor:
    x = s.integers(-1, 2, p.T, p.H).double()
    return torch.where(x == 0, 1.0, x)


def sat_w1(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Gate rows: one entry of +-128 or two, so that gates are multiples of 128; up rows: three entries of +-1 or +-2.

    x is +-1, so |gate| <= 256 and |up| <= 6, and h = gate * up fits bf16's 8 bits: 2 * 6 * 128 = 12 * 2^7.
    """
    gate, up = _sparse(s, rows, cols, 2, -1, 2) * 128, _sparse(s, rows, cols, 3, -2, 3)
    if not p.act.gated:
        return gate
    w = torch.where((torch.arange(rows, device=s.device) < rows // 2)[:, None], gate, up)
    if p.act.interleaved:
        w = torch.where((torch.arange(rows, device=s.device) % 2 == 0)[:, None], gate, up)
    return w


def sat_w2(p: Problem, s: Stream, rows: int, cols: int) -> Tensor:
    """Four entries of +-1 a row: |y| <= 4 * 12 * 2^7, which has at most 6 bits."""
    return _sparse(s, rows, cols, 4, -1, 2) * 2.0**-6
