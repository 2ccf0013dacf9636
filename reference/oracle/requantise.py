"""How far the codes of QUANT2 may be from the reference's when h itself may be off: for the end-to-end bound only.

A last-bit difference in GEMM1 moves an amax, and with it every boundary of its group; values near a boundary then take the
neighbouring code. With sigma the standard deviation of h and rho that of its scale, relative, s^2 = sigma^2 + (rho h)^2:

    within 1.5 s of a boundary either code is likely: a flip has a mean square of jump^2 / 4. 1.5 is the window over which the
    chance of a flip, erfc(d / sqrt 2 s) / 2 at distance d, has a mean of 1/4

    within 7 s a flip is rare, 0.5% on average, but it is one whole jump, not a small deviation. A variance of (2 jump / 7)^2
    each gives n such elements a bound of 2 sqrt(n) jumps: all of them up to n = 4, and beyond it more than will flip with
    the chance that seven sigmas have (2.6e-12). With one jump instead of two, pairs of flips would pass it with 1e-5

    beyond 7 s the code is certain

beside (rho h)^2 for the scale itself. (An average over boundaries, max(s^2, 0.8 step s) as in docs/tolerances.md 7.6, is
less than one jump where a single element outweighs its row.) Where scales are rounded coarsely (e8m0, e4m3) an amax near a
boundary may take either scale: the difference d of both results is a variance d^2 / 4.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.codes import round_values
from moeproof.reference.oracle.experts import live_slots
from moeproof.reference.oracle.products import Operand, decoded
from moeproof.reference.oracle.quant_stages import quant2
from moeproof.reference.oracle.quantise import Quantised, expand, fl

Tensor = torch.Tensor
SIGMAS = 7.0
LIKELY = 1.5
FLIPS = 2.0
"""Both follow from the chances above: tests/oracle/test_requantise.py works them out."""


def _jump(q: Quantised, h: Tensor, by: Tensor) -> Tensor:
    """How far the decoded value moves when h moves by `by` to either side and the scales stay."""
    scales, values = q.scales, q.values
    sides = [round_values((h + side) / scales, q.quantiser.format) * scales for side in (by, -by)]
    return torch.maximum((sides[0] - values).abs(), (sides[1] - values).abs())


def _relative(sigma: Tensor, h: Tensor, q: Quantised) -> Tensor:
    """Standard deviation of each group's amax relative to it, at every element of h (T, K, I)."""
    row = q.quantiser
    if not row.by_token:
        peak = h.abs().max() if h.numel() else h.new_zeros(())
        return torch.where(peak > 0, sigma.max() / peak, 0.0).expand_as(h) if h.numel() else torch.zeros_like(h)
    size = row.group[1] or h.shape[-1]
    pad = (0, -h.shape[-1] % size)
    top = torch.nn.functional.pad(h.abs(), pad).unflatten(-1, (-1, size)).amax(dim=-1)
    worst = torch.nn.functional.pad(sigma, pad).unflatten(-1, (-1, size)).amax(dim=-1)
    return expand(torch.where(top > 0, worst / top, 0.0), row, h.shape)


def requantised(inputs: Inputs, h: Tensor, variance: Tensor) -> tuple[Operand, Tensor]:
    """The operand that GEMM2 reads, made from float64 h (T, K, I), and the variance of its decoded values.

    NaN in h, of which nothing is known, makes NaN of its group.
    """
    h = torch.where(live_slots(inputs)[..., None], h, 0.0)
    made = quant2(inputs, fl(h))
    assert made.defined is not None
    values, sigma = made.values, variance.sqrt()
    static = made.quantiser.static
    rho = torch.zeros_like(h) if static else _relative(sigma, h, made)
    moved = (variance + (rho * h) ** 2).sqrt()
    likely, legal = _jump(made, h, LIKELY * moved) ** 2 / 4, (_jump(made, h, SIGMAS * moved) * FLIPS / SIGMAS) ** 2
    spread = torch.maximum(likely, legal) + (rho * values) ** 2
    if made.quantiser.scale != "fp32":
        shift = SIGMAS * (rho if not static else _relative(sigma, h, made))
        for side in (1 + shift, 1 - shift):
            spread = spread + (quant2(inputs, fl(h * side)).values - values) ** 2 / 4
    known = replace(decoded(made), values=torch.where(made.defined, values, torch.nan))
    return known, torch.where(((variance == 0) & (rho == 0)) | ~made.defined, 0.0, spread)
