"""The number formats one number at a time, to be checked against the standards by eye. `codes` is the vectorised twin.

Slow and plain on purpose: exact rational arithmetic, no bit tricks. Saturation, NaN, signed zero and subnormals:

    round    to nearest, ties to the even mantissa; subnormals are kept; the sign of zero is kept where the format has one
    overflow `saturate` clamps to the largest value first, as every quantiser does; without it ieee formats give infinity and
             the others NaN, or the largest value where every code is a number
    e8m0     has neither sign nor zero: what is below 2^-127 becomes 2^-127
"""

from __future__ import annotations

import math
from fractions import Fraction

from moeproof.reference.contract.formats import Format

NAN = math.nan


def decode(code: int, fmt: Format) -> float:
    """The value of a code 0 .. 2^width - 1. Exact: every format here is narrower than a Python float."""
    if fmt.name == "e8m0":
        return NAN if code == 255 else 2.0 ** (code - 127)
    if fmt.integer:
        if fmt.offset:
            return float(code - fmt.offset)
        return float(code - 256 if fmt.signed and code >= 128 else code)
    sign = -1.0 if code >> (fmt.width - 1) else 1.0
    exponent_bits = fmt.width - 1 - fmt.bits
    exponent = (code >> fmt.bits) & (2**exponent_bits - 1)
    mantissa = code & (2**fmt.bits - 1)
    if fmt.specials == "ieee" and exponent == 2**exponent_bits - 1:
        return NAN if mantissa else sign * math.inf
    if fmt.specials == "fn" and exponent == 2**exponent_bits - 1 and mantissa == 2**fmt.bits - 1:
        return NAN
    if fmt.specials == "fnuz" and code == 1 << (fmt.width - 1):
        return NAN
    if exponent == 0:
        return sign * mantissa * 2.0 ** (fmt.emin - fmt.bits)
    return sign * (1 + mantissa * 2.0**-fmt.bits) * 2.0 ** (exponent - fmt.bias)


def round_value(x: float, fmt: Format, saturate: bool = True) -> float:
    """The value of `fmt` nearest to x, ties to even."""
    if math.isnan(x):
        return NAN
    if fmt.name == "e8m0":
        return _nearest_power(x, fmt)
    high, low = fmt.max, fmt.low
    if saturate:
        x = min(max(x, low), high)
    elif math.isinf(x):
        return _overflow(x, fmt)
    if x == 0:
        return 0.0 if fmt.integer or fmt.specials == "fnuz" else x
    exponent = max(math.frexp(x)[1] - 1, fmt.emin)  # frexp's mantissa is in [1/2, 1)
    step = Fraction(2) ** (min(exponent, fmt.emax) - fmt.bits)
    steps = round(Fraction(x) / step)  # Python rounds halves to even
    value = float(steps * step)
    if not low <= value <= high:
        return _overflow(x, fmt)
    if value == 0:
        return 0.0 if fmt.integer or fmt.specials == "fnuz" else math.copysign(0.0, x)
    return value


def _nearest_power(x: float, fmt: Format) -> float:
    if not fmt.min < x < fmt.max:
        return fmt.min if x <= fmt.min else fmt.max
    exponent = math.frexp(x)[1] - 1
    below = 2.0**exponent
    # Its mantissa is always even, so the tie at 1.5 * 2^e goes by value: up.
    return below if x < 1.5 * below else 2 * below


def _overflow(x: float, fmt: Format) -> float:
    if fmt.specials == "ieee":
        return math.copysign(math.inf, x)
    if fmt.specials in ("fn", "fnuz"):
        return NAN
    return fmt.max if x > 0 else fmt.min


def encode(value: float, fmt: Format) -> int:
    """The code of a value that the format holds. Raises ValueError for any other."""
    for code in range(2**fmt.width):
        got = decode(code, fmt)
        if (got == value and math.copysign(1, got) == math.copysign(1, value)) or (math.isnan(got) and math.isnan(value)):
            return code
    raise ValueError(f"{value} is no value of {fmt.name}")
