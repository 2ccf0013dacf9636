"""Elementary functions as device code: float32 in and out, within 3 ulp, no overflow, interpreted and compiled alike."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def exp_of_negative(x):
    """exp(x) for x <= 0. tl.exp rounds x * log2(e), an error of |x| / 2 ulp; here x - n ln 2 is taken in two exact parts."""
    x = tl.where(x < -200.0, -200.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    rest = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def sigmoid(x):
    e = exp_of_negative(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0, e, 1.0), 1.0 + e)


@triton.jit
def quick_sigmoid(x, SCALE: tl.constexpr):
    """sigmoid(SCALE * x) by the hardware's exp2: relative error (10 + |SCALE * x|) 2^-24, exact 0 and 1 far out.

    ex2.approx is good to 2^-22 and div.full to 2 ulp (PTX ISA, tables of maximum relative error), the sum to half an ulp. The
    exponent is rounded once: its factor comes in two parts, as a rounded one would add |SCALE * x| / 5 ulp. An activation made
    of it so stays in the class of 2-ulp exponentials that the oracle calls exact.
    """
    FACTOR: tl.constexpr = SCALE * -1.4426950408889634
    # Veltkamp's splitting: the upper 24 bits of a double.
    SHIFTED: tl.constexpr = FACTOR * 536870913.0
    HIGH: tl.constexpr = SHIFTED - (SHIFTED - FACTOR)
    LOW: tl.constexpr = FACTOR - HIGH
    return 1.0 / (1.0 + tl.exp2(tl.fma(x, HIGH, x * LOW)))


@triton.jit
def tanh(x):
    """Exponentials above 0.625; Cephes' odd polynomial below, where 1 - exp(-2x) would cancel."""
    e = exp_of_negative(-2.0 * tl.abs(x))
    large = tl.div_rn(1.0 - e, 1.0 + e)
    small = tl.where(tl.abs(x) < 0.625, x, 0.0)
    y = small * small
    p = -5.70498872745e-3 * y + 2.06390887954e-2
    p = p * y - 5.37397155531e-2
    p = p * y + 1.33314422036e-1
    p = p * y - 3.33332819422e-1
    return tl.where(tl.abs(x) < 0.625, small + small * y * p, tl.where(x < 0, -large, large))


@triton.jit
def softplus(x):
    """log(1 + exp(x)). log1p(e) = log(u) e / (u - 1) with u = 1 + e keeps the relative accuracy of small e (Kahan)."""
    e = exp_of_negative(-tl.abs(x))
    u = 1.0 + e
    low = tl.where(u == 1.0, e, tl.div_rn(tl.log(u) * e, tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(x > 0, x, 0.0) + low


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def gelu_tanh(x):
    """x (1 + tanh z) / 2 = x sigmoid(2z), with z = sqrt(2 / pi) (x + 0.044715 x^3)."""
    return x * sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
