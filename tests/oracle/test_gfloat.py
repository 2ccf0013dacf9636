"""The formats against gfloat, a library written for that alone: every code, every rounding boundary, saturating and not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.oracle import codes, standard
from moeproof.reference.oracle.rounding import round_to

gfloat = pytest.importorskip("gfloat")
formats = pytest.importorskip("gfloat.formats")

THEIRS = {
    "fp16": formats.format_info_binary16,
    "bf16": formats.format_info_bfloat16,
    "e4m3fn": formats.format_info_ocp_e4m3,
    "e5m2": formats.format_info_ocp_e5m2,
    "e8m0": formats.format_info_ocp_e8m0,
    "e2m1": formats.format_info_ocp_e2m1,
    "e3m2": formats.format_info_ocp_e3m2,
    "e2m3": formats.format_info_ocp_e2m3,
}
NARROW = [name for name in THEIRS if FORMATS[name].width <= 8]
ROUNDED = [name for name in NARROW if name != "e8m0"]  # a scale's rule picks its exponent, nothing rounds to it


def _same(a: float, b: float) -> bool:
    return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))


def _theirs(name: str) -> list[float]:
    return [gfloat.decode_float(THEIRS[name], code).fval for code in range(2 ** FORMATS[name].width)]


@pytest.mark.parametrize("name", NARROW)
def test_every_code_means_what_gfloat_says(name: str) -> None:
    fmt, theirs = FORMATS[name], _theirs(name)
    vector = codes.from_codes(torch.arange(2**fmt.width, dtype=torch.uint8), fmt).tolist()

    assert all(_same(standard.decode(code, fmt), value) for code, value in enumerate(theirs))
    assert all(_same(ours, value) for ours, value in zip(vector, theirs, strict=True))


def _points(values: list[float]) -> list[float]:
    """All values, all midpoints, both neighbours of each, and what lies beyond, of both signs."""
    finite = sorted({abs(v) for v in values if math.isfinite(v)})
    middles = [(a + b) / 2 for a, b in itertools.pairwise(finite)]
    top = finite[-1] + (finite[-1] - finite[-2]) / 2
    near = [math.nextafter(m, side) for m in (*middles, top) for side in (0.0, math.inf)]
    return [sign * p for p in (*finite, *middles, *near, top, 2 * top, math.inf) for sign in (1.0, -1.0)]


@pytest.mark.parametrize("name", ROUNDED)
def test_every_rounding_boundary_is_gfloat_s(name: str) -> None:
    fmt, points = FORMATS[name], _points(_theirs(name))
    want = [gfloat.round_float(THEIRS[name], p, sat=True) for p in points]
    vector = codes.round_values(torch.tensor(points, dtype=torch.float64), fmt).tolist()

    for point, scalar, ours, theirs in zip(points, [standard.round_value(p, fmt) for p in points], vector, want, strict=True):
        assert _same(scalar, theirs) and _same(ours, theirs), (point, scalar, ours, theirs)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_16_bit_rounding_is_gfloat_s_at_every_binade(name: str) -> None:
    """Every 61st value and its midpoint with the next: all binades, all ends of the mantissa over time."""
    fmt = FORMATS[name]
    values = _sixteen(fmt)[::61]
    points = _points(values.tolist())
    ours = round_to(torch.tensor(points, dtype=torch.float64), fmt).tolist()

    assert all(_same(a, gfloat.round_float(THEIRS[name], p)) for a, p in zip(ours, points, strict=True))


def _sixteen(fmt: Format) -> torch.Tensor:
    """Finite positive values of a 16-bit format, ascending."""
    every = torch.arange(2**15).to(torch.int16).view(fmt.dtype).double()
    return every[every.isfinite()]
