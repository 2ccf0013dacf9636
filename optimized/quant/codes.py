"""Codes of narrow formats as device code: float32 -> code and back, by integer arithmetic on the float's bits.

No conversion instruction is asked: they differ between architectures (fp32 -> e4m3 rounds twice on sm_89 with Triton 3.6)
and do not exist for most formats. FMT is a row of the format table (reference.contract.formats), a compile-time constant.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def encode(x, FMT: tl.constexpr):
    """int32 code of float32 x: clamped to the range of FMT, rounded once to nearest even. Integers have no offset here.

    The sign of zero is kept. NaN has one code whatever its own bits (they differ between CPU and GPU): FMT's NaN, or the
    largest value where there is none, or integer 0.
    """
    if FMT.integer:
        x = tl.where(x < FMT.low, FMT.low, tl.where(x > FMT.max, FMT.max, tl.where(x == x, x, 0.0)))
        # 1.5 * 2^23: adding it leaves no room for a fraction, so that the addition rounds to an integer.
        code = bits_of(x + 12582912.0) - 0x4B400000
    else:
        DROPPED: tl.constexpr = 23 - FMT.bits
        magnitude = bits_of(x) & 0x7FFFFFFF
        nan = magnitude > 0x7F800000
        sign = tl.where(nan, 0, (bits_of(x) >> 31) & 1)
        largest = bits_of(tl.full([], FMT.max, tl.float32))
        magnitude = tl.minimum(magnitude, largest)
        # Half of what is dropped, less one where what stays is even: a carry moves into the exponent by itself.
        normal = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
        normal -= (FMT.emin + 126) << FMT.bits
        # Below 2^emin the step is fixed. Adding 2^23 steps leaves the number of steps in the low bits of the sum.
        steps_up: tl.constexpr = 2.0 ** (FMT.emin - FMT.bits + 23)
        subnormal = bits_of(float_of(magnitude) + steps_up) & 0x7FFFFF
        code = tl.where(magnitude < ((FMT.emin + 127) << 23), subnormal, normal)
        if FMT.specials == "fn":
            code = tl.where(nan, (1 << (FMT.width - 1)) - 1, code)
        code = code | (sign << (FMT.width - 1))
    return code


@triton.jit
def decode(code, FMT: tl.constexpr):
    """float32 value of a code, exact. `code` is an integer tensor with the code in its low FMT.width bits; int8 is signed."""
    code = code.to(tl.int32)
    if FMT.integer:
        value = (code - FMT.offset).to(tl.float32)
    elif FMT.name == "e8m0":
        # Code 0 is 2^-127, which float32 holds as a subnormal; code 255 is NaN.
        value = float_of(tl.where(code == 0, 0x00400000, tl.where(code == 255, 0x7FC00000, code << 23)))
    else:
        tl.static_assert(FMT.specials == "fn" or FMT.specials == "none")
        magnitude = code & ((1 << (FMT.width - 1)) - 1)
        # The fields in float32's places, then the exponent's bias; a subnormal code passes as a subnormal float32.
        value = float_of(magnitude << (23 - FMT.bits)) * 2.0 ** (126 + FMT.emin)
        if FMT.specials == "fn":
            value = tl.where(magnitude == (1 << (FMT.width - 1)) - 1, float("nan"), value)
        value = float_of(bits_of(value) | ((code >> (FMT.width - 1) & 1) << 31))
    return value


@triton.jit
def low_high(bytes):
    """(.., n) bytes -> (.., 2 n) codes of four bits: the low nibble holds the even column."""
    return tl.interleave(bytes & 15, (bytes >> 4) & 15)
