"""GEMM1 and GEMM2 on quantised operands: exact sums of decoded values, and the allowed error of computing them.

The two sources of error stay apart: quantising is judged on bits (quant_stages), so a product is judged on the values that
its own codes stand for, and its bound knows nothing of rounding to codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.tensor_cores import FP8_FRACTION, PROMOTED
from moeproof.reference.oracle.bounds import EXACT_TERMS, LEAST, OVERFLOW, U32, U64, accumulator
from moeproof.reference.oracle.experts import by_expert, local_ids
from moeproof.reference.oracle.overflow import may_overflow
from moeproof.reference.oracle.quant_stages import weight
from moeproof.reference.oracle.quantise import Quantised
from moeproof.reference.oracle.rounding import lowest_bit, quanta, round_to

Tensor = torch.Tensor
U_FP8 = 2.0**-FP8_FRACTION
TRUNCATED = 25
"""What promoted sums of one sign lose, in units of 2^-13 S. A block of 128 is 4 steps of 32 products beside the partial
sum; each of these 33 loses half a quantum on average, and the quantum follows the partial sum, 0, 1/4, 1/2 and 3/4 of the
block's: 33 / 2 * 1.5 = 24.75. Simulated: 10.4 at K = 128, 5.5 at K = 2048 (tests/oracle/test_products.py)."""
STEP = 32
"""fp8 products that a tensor core adds at a time, to a quantum of 2^-13 times the largest power of two among them and the
partial sum M: each of the 33 loses less than a quantum, toward zero."""
CUT = 3 / (8 * math.log(2)) * (STEP + 1) / 3
"""Second moment of what a step of products of both signs loses, in units of (2^-13 M)^2. A loss spread over [0, q) has q^2 / 3,
and q, the power of two below 2^-13 M, has a mean square of 3 / (8 ln 2) of it (Benford: mantissas spread evenly in logs)."""
SIGMAS = 7
SCALING = 4
"""float32 roundings of each partial sum that scales bring: conversion, two scales, and their addition."""


@dataclass(frozen=True)
class Operand:
    """One side of a product: float64 values (.., A), and what they are made of.

    `fmt` is the format that enters the multiplier, `group` the columns that share a scale (0: all of them, so that scales
    leave the sum alone).
    """

    values: Tensor
    fmt: Format
    group: int = 0
    quantised: bool = True
    codes: Tensor | None = None
    """(.., A) what the values are before any scale, and (.., G) their scales; None where the values are numbers themselves."""
    scales: Tensor | None = None

    @property
    def groups(self) -> int:
        """Scale groups along A."""
        return -(-self.values.shape[-1] // self.group) if self.group else 1

    def over(self, change: Callable[[Tensor], Tensor]) -> Operand:
        """With other leading dims: rows picked or repeated."""
        return replace(
            self,
            values=change(self.values),
            codes=None if self.codes is None else change(self.codes),
            scales=None if self.scales is None else change(self.scales),
        )

    def in_slots(self, K: int) -> Operand:
        """(T, A) -> (T, K, A): each token's row in all of its slots."""
        return self.over(lambda t: t[:, None, :].expand(t.shape[0], K, t.shape[1]))


def plain(values: Tensor, fmt: Format) -> Operand:
    """An operand in the problem's dtype."""
    return Operand(values.double(), fmt, quantised=False)


def decoded(q: Quantised) -> Operand:
    return Operand(q.values, q.quantiser.format, q.quantiser.group[1], True, q.integers, q.group_scales)


def _eight_bit_float(fmt: Format) -> bool:
    """Codes that an FP8 multiplier takes as they are: fp8, and whatever e4m3 holds exactly."""
    return fmt.width <= 8 and fmt.bits <= FORMATS["e4m3fn"].bits


def accumulator_class(x: Format, w: Format, claims: Claims) -> str:
    """Which row of the policy bounds this product: `int32`, `fp8_promoted`, `fp8_unpromoted`, or the claim as it stands."""
    if x.integer and w.integer:
        return "int32"
    if claims.accumulate.startswith("fp8"):
        return claims.accumulate if _eight_bit_float(x) and _eight_bit_float(w) else "fp32"
    return claims.accumulate


@dataclass(frozen=True)
class Sum:
    """What the error of a sum of products depends on."""

    x: Operand
    w: Operand
    S: Tensor
    """Sum of magnitudes."""
    exact: Tensor
    dtype: Format
    """The problem's dtype: both operands are in it, or what a code meets is."""

    @property
    def length(self) -> int:
        return self.x.values.shape[-1]


def _claimed(kind: str) -> Callable[[Sum], Tensor]:
    """float32, tf32 and dtype accumulation: `bounds.accumulator`, 16-bit where codes are multiplied."""

    def error(s: Sum) -> Tensor:
        wide = FORMATS["bf16"] if s.x.quantised and s.w.quantised else s.dtype
        return accumulator(s.length, wide, Claims(accumulate=kind)) * s.S

    return error


def _int32(s: Sum) -> Tensor:
    groups = max(s.x.groups, s.w.groups)
    return (groups if groups > 1 else 0) * U32 * s.S


def _squares(x: Tensor, w: Tensor) -> Tensor:
    """Q: the sum of squared products. What partial sums of random signs walk through has this variance."""
    return x**2 @ (w**2).T


def _promoted(s: Sum) -> Tensor:
    """Blocks of 128, each four steps of 32 from zero, added in float32.

    At t = 0, 1/4, 1/2, 3/4 of a block with sum y_b the partial sum has the square t^2 y_b^2 + t (1 - t) Q_b, and the largest
    product of a step at most Q_b / 4: the mean of M^2 is 7/32 y_b^2 + 13/32 Q_b. What signs in common lose follows |y|.
    """
    x, w = (o.values.split(PROMOTED, dim=-1) for o in (s.x, s.w))
    sums = sum(((a @ b.T) ** 2 for a, b in zip(x, w, strict=True)), start=torch.zeros_like(s.S))
    walk = 4 * CUT * (7 / 32 * sums + 13 / 32 * _squares(s.x.values, s.w.values))
    likely = TRUNCATED * s.exact.abs() + SIGMAS * walk.sqrt()
    return U_FP8 * torch.minimum(TRUNCATED * s.S, likely) + (math.ceil(s.length / PROMOTED) + 2) * U32 * s.S


def _unpromoted(s: Sum) -> Tensor:
    """n = K/32 steps into one sum. Over them the mean of M^2 is R^2 = y^2 / 3 + Q / 6 + Q / n, as for a block.

    Half a quantum, 0.72 of 2^-13 M on average, is lost by the partial sum in every step, and by the share |y| / S of 32
    products that have its sign beyond those of the other: (12 |y| / S + 1/2) n R. Of one sign that is 6 n S, with 8 to spare.
    """
    n = math.ceil(s.length / STEP)
    reach = (s.exact**2 / 3 + _squares(s.x.values, s.w.values) * (1 / 6 + 1 / n)).sqrt()
    together = s.exact.abs() / s.S.clamp(min=LEAST)
    likely = reach * (n * (12 * together + 0.5) + SIGMAS * math.sqrt(n * CUT))
    return U_FP8 * torch.minimum((6 * n + 8) * s.S, likely)


@dataclass(frozen=True)
class Accumulation:
    """One row of the policy: how far a sum of products may be off, in words and as a function."""

    formula: str
    why: str
    error: Callable[[Sum], Tensor]


ACCUMULATIONS: dict[str, Accumulation] = {
    "fp32": Accumulation(
        "(2.5 K/16 + 8) u S; both operands fp32: min(K, 2 sqrt K + 8) u S",
        "tensor cores truncate each step of 16 products to its largest exponent, always toward zero: linear in the steps",
        _claimed("fp32"),
    ),
    "tf32": Accumulation("the fp32 row + 2^-9 S", "both operands lose up to one unit of 10 mantissa bits", _claimed("tf32")),
    "dtype": Accumulation("K u_dtype S", "every partial sum is rounded to the problem's dtype", _claimed("dtype")),
    "int32": Accumulation(
        "0; G u S for G > 1 scale groups",
        "int8 products are exact in int32 up to K = 133,000; groups are added in float32",
        _int32,
    ),
    "fp8_promoted": Accumulation(
        "v min(25 S, 25 |y| + 7 sqrt(5.2 sum_b y_b^2 + 9.7 Q)) + (K/128 + 2) u S, v = 2^-13, Q = sum x^2 w^2",
        "13 fraction bits inside 128 products, float32 above: 33 terms a step lose half a quantum each, by their signs",
        _promoted,
    ),
    "fp8_unpromoted": Accumulation(
        "v min((6 n + 8) S, R (n (12 |y|/S + 1/2) + 17 sqrt n)), R^2 = y^2/3 + Q (1/6 + 1/n), n = K/32, v and Q as promoted",
        "13 fraction bits over the whole sum, truncated toward zero: the loss follows the partial sum, and signs in common",
        _unpromoted,
    ),
}
"""u = 2^-24, S = sum |x||w| over decoded values. Sources: docs/tolerances.md 7.3 and section 5."""


def product(x: Operand, w: Operand, dtype: Format, claims: Claims, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(exact, error), float64 (rows of x, rows of w): x w^T (+ bias), and how far float32 arithmetic may be from it.

    The error is infinite where float32 may leave its range on the way (overflow.py).
    """
    kind = accumulator_class(x.fmt, w.fmt, claims)
    if claims.decode == "dtype" and not x.quantised:
        w = Operand(round_to(w.values, dtype), dtype)
    exact = x.values @ w.values.T
    S = x.values.abs() @ w.values.abs().T
    quantum = quanta(x.values).amin(dim=-1)[:, None] * quanta(w.values).amin(dim=-1)[None]
    error = ACCUMULATIONS[kind].error(Sum(x, w, S, exact, dtype)) + x.values.shape[-1] * U64 * S
    if max(x.groups, w.groups) > 1:
        error = error + SCALING * U32 * S
    if bias is not None:
        b = bias.double()
        exact, S = exact + b, S + b.abs()
        quantum = torch.minimum(quantum, torch.full_like(quantum, lowest_bit(b)))
        error = error + 2 * U32 * S
    error = error + 6 * U32 * exact.abs()
    terms = U_FP8**-1 if kind.startswith("fp8") else EXACT_TERMS
    finite = torch.where(quantum.isinf(), 1.0, quantum)  # a row of zeros: nothing to round
    proved = (terms * finite >= S) & (S < OVERFLOW) & (finite >= LEAST) & (kind in ("fp32", "int32", "fp8_promoted"))
    error = torch.where(proved | (S == 0), 0.0, error)
    return exact, torch.where(may_overflow(x, w, S + error), torch.inf, error)


def grouped(
    inputs: Inputs, name: str, x_TKA: Operand, bias_eB: Tensor | None, claims: Claims, width: int
) -> tuple[Tensor, Tensor]:
    """(exact, error), float64 (T, K, width): each row times its own expert's quantised weights. Zero where not live."""
    local = local_ids(inputs)
    exact = torch.zeros(*local.shape, width, dtype=torch.float64, device=inputs.device)
    error = torch.zeros_like(exact)
    for expert, tokens, slots in by_expert(local, inputs.w1.shape[0]):
        rows = x_TKA.over(itemgetter((tokens, slots)))
        bias = None if bias_eB is None else bias_eB[expert]
        w = decoded(weight(inputs, name, expert))
        exact[tokens, slots], error[tokens, slots] = product(rows, w, inputs.problem.fmt, claims, bias)
    return exact, error
