"""Number formats as numpy sees them: bf16 and fp8 bit patterns to float32 and back, each rounding written out.

The interpreter keeps bf16 as uint16 and fp8 as uint8, because numpy has neither type. `decode` widens such codes to
float32 (exact), `encode` rounds once to the nearest code, ties to even. fp16, fp32 and fp64 are numpy's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Format:
    """A binary float: `code = exponent field, mantissa field` below the sign bit."""

    bits: int
    mantissa: int
    bias: int
    largest: int  # code of the largest finite value
    overflow: int  # code of whatever is larger still: infinity, or `largest` where the hardware saturates
    nan: int

    @property
    def dtype(self) -> np.dtype[Any]:
        """The unsigned numpy type that holds a code."""
        return np.dtype(f"uint{self.bits}")

    @property
    def lowest_exponent(self) -> int:
        """Exponent of the smallest normal value; subnormals share it."""
        return 1 - self.bias

    @property
    def unsigned_zero(self) -> bool:
        """The AMD "fnuz" formats: the code of minus zero is their only NaN."""
        return self.nan == 1 << (self.bits - 1)


# Keys are Triton's names. NaN codes are those of PTX `cvt`; fp8 saturates as `cvt.rn.satfinite` does.
# fp8e4b15, Triton's own emulated format, is left to the stock interpreter.
FORMATS = {
    "fp32": Format(32, 23, 127, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF),
    "fp16": Format(16, 10, 15, 0x7BFF, 0x7C00, 0x7FFF),
    "bf16": Format(16, 7, 127, 0x7F7F, 0x7F80, 0x7FFF),
    "fp8e4nv": Format(8, 3, 7, 0x7E, 0x7E, 0x7F),
    "fp8e5": Format(8, 2, 15, 0x7B, 0x7B, 0x7F),
    "fp8e4b8": Format(8, 3, 8, 0x7F, 0x7F, 0x80),
    "fp8e5b16": Format(8, 2, 16, 0x7F, 0x7F, 0x80),
}
NARROW = frozenset(FORMATS) - {"fp32", "fp16"}  # those that numpy holds as bare codes


def decode(codes: Array, name: str) -> Array:
    """The float32 values of bf16 or fp8 codes."""
    if name == "bf16":
        return (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _table(name)[codes]


@cache
def _table(name: str) -> Array:
    """float32 value of each of the 256 codes of an fp8 format."""
    form = FORMATS[name]
    codes = np.arange(256)
    magnitude = codes & 0x7F
    field, fraction = magnitude >> form.mantissa, magnitude & ((1 << form.mantissa) - 1)
    significand = np.where(field > 0, fraction + (1 << form.mantissa), fraction).astype(np.float64)
    values = np.ldexp(significand, np.maximum(field, 1) - form.bias - form.mantissa)
    values[magnitude > form.largest] = np.nan
    if name == "fp8e5":
        values[magnitude == 0x7C] = np.inf
    values = np.copysign(values, np.where(codes & 0x80, -1.0, 1.0))
    if form.unsigned_zero:
        values[form.nan] = np.nan
    return values.astype(np.float32)


def encode(values: Array, name: str, toward_zero: bool = False) -> Array:
    """Codes of float32 or float64 values, rounded once: to nearest even, or toward zero."""
    form = FORMATS[name]
    if name == "bf16" and values.dtype == np.float32 and not toward_zero:
        return _bf16_from_float32(values)
    wide = np.asarray(values, dtype=np.float64)  # exact
    unknown = np.isnan(wide)
    # Twice the largest power of two is past the largest code, and keeps infinities out of the integer arithmetic.
    ceiling = 2.0 ** ((form.largest >> form.mantissa) - form.bias + 1)
    magnitude = np.minimum(np.abs(np.where(unknown, 0.0, wide)), ceiling)
    exponent = np.maximum(np.frexp(magnitude)[1] - 1, form.lowest_exponent)
    exponent = np.where(magnitude == 0.0, form.lowest_exponent, exponent).astype(np.int64)
    # In units of the last place the rounding is to an integer; a carry into the exponent falls out of the addition.
    units = np.ldexp(magnitude, form.mantissa - exponent)
    units = np.trunc(units) if toward_zero else np.rint(units)
    codes = ((exponent - form.lowest_exponent) << form.mantissa) + units.astype(np.int64)
    beyond = np.where(np.isinf(wide) | (not toward_zero), form.overflow, form.largest)
    codes = np.where(codes > form.largest, beyond, codes)
    negative = np.signbit(wide) & ~(form.unsigned_zero & (codes == 0))
    codes = np.where(unknown, form.nan, codes | (negative.astype(np.int64) << (form.bits - 1)))
    return codes.astype(form.dtype)


def _bf16_from_float32(values: Array) -> Array:
    """The hot path: add half of the last place kept, less one on even codes, and cut."""
    bits = values.view(np.uint32)
    tie_to_even = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + (np.uint32(0x7FFF) + tie_to_even)) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(FORMATS["bf16"].nan), rounded).astype(np.uint16)


def fused_multiply_add(x: Array, y: Array, z: Array) -> Array:
    """x * y + z in float64, rounded to odd, so that one more rounding to float32 or narrower is the only one.

    The product of two float32 values is exact in float64. Their sum with z is not; its error (Knuth's two-sum) says
    on which side the true value lies, and of the two neighbours the one with an odd last bit is kept.
    """
    product = np.asarray(x, dtype=np.float64) * np.asarray(y, dtype=np.float64)
    addend = np.broadcast_to(np.asarray(z, dtype=np.float64), product.shape)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(np.int64) & 1) == 0
    inexact = np.isfinite(error) & (error != 0.0) & even
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)


def drop_to_tf32(values: Array) -> Array:
    """float32 with the low 13 mantissa bits cleared, as the tensor core reads an operand no one has rounded."""
    return (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def decode_e8m0(codes: Array) -> Array:
    """Block scales 2^(code - 127); 255 is NaN, and 0 is the subnormal 2^-127."""
    table = np.append(np.ldexp(np.float32(1.0), np.arange(255) - 127), np.float32(np.nan))
    return table[codes.view(np.uint8)]


def decode_e2m1(codes: Array, axis: int) -> Array:
    """Two FP4 values a byte, the low half first, spread along `axis`."""
    half = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=np.float32)
    values = np.concatenate([half, -half])
    pairs = np.stack([values[codes & 15], values[codes >> 4]], axis=axis if axis >= 0 else codes.ndim + axis + 1)
    shape = list(codes.shape)
    shape[axis] *= 2
    return pairs.reshape(shape)
