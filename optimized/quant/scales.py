"""Scales of activations as device code: RULES and QUOTIENTS of the scheme table, every float32 operation rounded by itself.

Q is a row's Quantiser and SCALE its scale's Format, compile-time constants. No operation here is a product whose sum follows,
so nothing can be contracted to an fma. Powers of two come from exponent bits: log2 errs next to them.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moeproof.optimized.quant.codes import bits_of, decode, encode, float_of


@triton.jit
def _exponent_code(amax, Q: tl.constexpr, FMT: tl.constexpr):
    """e8m0 code of ocp_floor or round_up. amax below 2^-126, where the exponent field is 0, ends at code 0 as 0 does."""
    bits = bits_of(amax)
    code = (bits >> 23) - FMT.emax
    if Q.rule == "round_up":
        # One more where amax is above max * 2^e: its mantissa is then the larger one.
        largest = bits_of(tl.full([], FMT.max, tl.float32)) & 0x7FFFFF
        code = tl.where((bits & 0x7FFFFF) > largest, code + 1, code)
    return tl.minimum(tl.maximum(code, 0), 254)


@triton.jit
def stored_scale(amax, given, Q: tl.constexpr, FMT: tl.constexpr, SCALE: tl.constexpr):
    """What is stored for a group whose largest magnitude is `amax`: a float32 scale, or an int32 code of SCALE.

    `given` is the static scale (returned verbatim) or the global scale of a two-level row, else not looked at.
    """
    if Q.static and not Q.two_level:
        s = tl.broadcast_to(given, amax.shape)
    elif Q.rule == "amax":
        s = tl.div_rn(tl.maximum(amax, Q.floor), FMT.max + tl.zeros_like(amax))
    elif Q.two_level:
        s = tl.div_rn(amax, FMT.max + tl.zeros_like(amax))
        if Q.rule == "two_level_decode":
            s = tl.div_rn(s, given + tl.zeros_like(amax))
        else:
            s = s * given
        # A scale of 0 becomes the least positive one, code 1.
        s = tl.maximum(encode(s, SCALE), 1)
    else:
        s = _exponent_code(amax, Q, FMT)
    return s


@triton.jit
def factor(stored, amax, given, Q: tl.constexpr, FMT: tl.constexpr, SCALE: tl.constexpr):
    """float32 by which `quotient` divides (divide, two_level_decode) or multiplies, given the stored scale of the group."""
    if Q.rule == "ocp_floor" or Q.rule == "round_up":
        # 1 / 2^(code - 127): codes stay below 254 because emax >= 2, so this is a normal number.
        f = float_of((254 - stored) << 23)
    elif Q.quotient == "divide":
        f = stored
    elif Q.quotient == "reciprocal":
        f = tl.div_rn(1.0 + tl.zeros_like(stored), stored)
    elif Q.quotient == "inverse":
        f = tl.div_rn(FMT.max + tl.zeros_like(amax), tl.maximum(amax, Q.floor))
    elif Q.quotient == "two_level_decode":
        f = decode(stored, SCALE) * given
    else:
        tl.static_assert(Q.quotient == "two_level_encode")
        f = tl.div_rn(given + tl.zeros_like(amax), decode(stored, SCALE))
    return f


@triton.jit
def quotient(x, f, Q: tl.constexpr):
    """float32 that is clamped and rounded to a code. Multiplying by an exact power of two is dividing by its inverse."""
    if Q.quotient == "two_level_decode" or (Q.quotient == "divide" and Q.rule == "amax"):
        y = tl.div_rn(x, f)
    else:
        y = x * f
    return y
