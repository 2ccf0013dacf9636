"""Slow and exact specification of the float formats, sharing no code with the harness.

A format is a table of its finite values, built as Fractions from the definition. `nearest` rounds by search in that
table, `nearest_exact` rounds a Fraction by integer arithmetic; a test holds the two against each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """exponent bits e, mantissa bits m, bias; what stands at the top of the code space; what overflow becomes."""

    e: int
    m: int
    bias: int
    infinity: bool
    saturates: bool
    negative_zero_is_nan: bool = False

    @property
    def bits(self) -> int:
        return 1 + self.e + self.m


SPECS = {
    "fp32": Spec(8, 23, 127, infinity=True, saturates=False),
    "fp16": Spec(5, 10, 15, infinity=True, saturates=False),
    "bf16": Spec(8, 7, 127, infinity=True, saturates=False),
    "fp8e4nv": Spec(4, 3, 7, infinity=False, saturates=True),
    "fp8e5": Spec(5, 2, 15, infinity=True, saturates=True),
    "fp8e4b8": Spec(4, 3, 8, infinity=False, saturates=True, negative_zero_is_nan=True),
    "fp8e5b16": Spec(5, 2, 16, infinity=False, saturates=True, negative_zero_is_nan=True),
}


def number_of_finite(name: str) -> int:
    """How many codes, from 0 up, are finite and not negative."""
    spec = SPECS[name]
    half = 1 << (spec.bits - 1)
    if spec.negative_zero_is_nan:
        return half
    return half - (1 << spec.m) if spec.infinity else half - 1


def finite_value(name: str, code: int) -> Fraction:
    """(-1)^0 * 2^(E - bias) * 1.f, or 2^(1 - bias) * 0.f for E = 0."""
    spec = SPECS[name]
    field, fraction = code >> spec.m, Fraction(code % (1 << spec.m), 1 << spec.m)
    exponent = max(field, 1) - spec.bias
    return (fraction + (1 if field else 0)) * Fraction(2) ** exponent


@cache
def table(name: str) -> Array:
    """Finite non-negative values in ascending order; index is code. Exact in float64."""
    return np.array([float(finite_value(name, code)) for code in range(number_of_finite(name))])


@cache
def all_values(name: str) -> Array:
    """float64 value of every code, NaN and infinities included."""
    spec, finite = SPECS[name], table(name)
    half = np.full(1 << (spec.bits - 1), np.nan)
    half[: finite.size] = finite
    if spec.infinity:
        half[finite.size] = np.inf
    values = np.concatenate([half, -half])
    if spec.negative_zero_is_nan:
        values[half.size] = np.nan
    return values


def _overflow(name: str) -> int:
    return number_of_finite(name) - (1 if SPECS[name].saturates else 0)


def nearest(values: Array, name: str, toward_zero: bool = False) -> Array:
    """Codes by search: the neighbours below and above in the table, ties to the even code. NaN gives code -1."""
    finite, sign_bit = table(name), 1 << (SPECS[name].bits - 1)
    step = finite[-1] - finite[-2]
    above = np.append(finite[1:], finite[-1] + step)  # past the largest: the next value if the exponent had no end
    magnitude = np.abs(np.asarray(values, dtype=np.float64))
    low = np.clip(np.searchsorted(finite, magnitude, side="right") - 1, 0, finite.size - 1)
    middle = (finite[low] + above[low]) / 2  # exact: both have few bits
    up = (magnitude > middle) | ((magnitude == middle) & (low % 2 == 1))
    codes = low + (up & ~np.bool_(toward_zero))
    too_big = (codes >= finite.size) | np.isinf(magnitude)
    codes = np.where(too_big, _overflow(name), codes)
    minus = np.signbit(values) & ~((codes == 0) & SPECS[name].negative_zero_is_nan)
    return np.where(np.isnan(magnitude), -1, codes + np.where(minus, sign_bit, 0))


def nearest_exact(value: Fraction, name: str) -> int:
    """Code of a rational number; zero is positive."""
    spec, magnitude = SPECS[name], abs(value)
    if magnitude == 0:
        return 0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    exponent = max(exponent, 1 - spec.bias)
    units = round(magnitude / Fraction(2) ** (exponent - spec.m))  # Python rounds Fractions to even
    code = ((exponent + spec.bias - 1) << spec.m) + units
    if code >= number_of_finite(name):
        code = _overflow(name)
    return code + (1 << (spec.bits - 1) if value < 0 and (code or not spec.negative_zero_is_nan) else 0)


def same(codes: Array, expected: Array, name: str) -> Array:
    """Elementwise: equal codes, where any NaN is as good as another (-1 stands for NaN in `expected`)."""
    is_nan = np.isnan(value_of(codes, name))
    return np.where(np.asarray(expected) == -1, is_nan, codes.astype(np.int64) == expected)


def value_of(codes: Array, name: str) -> Array:
    """float64 values of codes; fp32 by numpy's own view, because its table would not fit."""
    if name == "fp32":
        return codes.astype(np.uint32).view(np.float32).astype(np.float64)
    return all_values(name)[codes.astype(np.int64)]


def exact(value: float) -> Fraction:
    """A finite float as the rational it is."""
    assert math.isfinite(value)
    return Fraction(float(value))
