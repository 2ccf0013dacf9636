"""The exhaustive sweep of a quantiser: every code it can write, and both sides of every boundary between two codes.

The first column of each scale group holds the format's maximum times a power of two, so that the scale is that power exactly,
whatever formula makes it; the others count through the list, in both signs. What QUANT1 writes has one right answer each.
"""

from __future__ import annotations

import math

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL
from moeproof.reference.oracle.codes import from_codes
from moeproof.reference.oracle.rounding import round_to, ulp

Tensor = torch.Tensor


def points(codes: Format, stored: Format, device: torch.device | str = "cpu") -> Tensor:
    """float64 (n,): the values of a format's codes, the midpoints between them and the neighbours of both in `stored`, as far
    as they do not exceed the maximum, with either sign. Zero goes without neighbours: nothing rounds there.
    """
    every = from_codes(torch.arange(1 << codes.width, device=device), codes)
    values = every[(every >= 0) & (every <= codes.max)].unique()
    exact = torch.cat([values, (values[1:] + values[:-1]) / 2])
    step = torch.where(exact == 0, 0.0, ulp(exact, stored))
    near = torch.cat([exact, exact + step, exact - step])
    near = round_to(near[near <= codes.max], stored).unique()
    return torch.cat([near, -near])


def codes_x(p: Problem, s: Stream) -> Tensor:
    """float64 (T, H): the points in turn, each token from where the last one stopped, tokens a binade apart."""
    q = p.quant.a1
    assert q is not None
    swept = points(q.format, p.fmt, s.device)
    column = torch.arange(p.H, device=s.device)
    pin = column % (p.H if q.group[1] == ALL else q.group[1]) == 0
    free = int((~pin).sum())
    place = (torch.cumsum(~pin, 0) - 1)[None] + torch.arange(p.T, device=s.device)[:, None] * free
    x = torch.where(pin, q.format.max, swept[place.clamp(min=0) % swept.numel()])
    # A root mean square near 1, by a power of two.
    size = 2.0 ** -round(math.log2(float(swept.square().mean().sqrt())))
    token = torch.zeros(p.T, device=s.device) if not q.by_token else torch.arange(p.T, device=s.device) % 5 - 2.0
    return x * size * 2.0 ** token.double()[:, None]
