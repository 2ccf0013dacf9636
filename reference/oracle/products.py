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


def _blocks(x: Tensor, size: int) -> Tensor:
    """(rows, A) -> (rows, ceil(A / size)): largest magnitude of each block of columns."""
    return torch.stack([part.abs().amax(dim=-1) for part in x.split(size, dim=-1)], dim=-1)


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


def _promoted(s: Sum) -> Tensor:
    largest = (_blocks(s.x.values, PROMOTED) ** 2 @ (_blocks(s.w.values, PROMOTED) ** 2).T).sqrt()
    likely = U_FP8 * (TRUNCATED * s.exact.abs() + 8 * largest)
    return torch.minimum(TRUNCATED * U_FP8 * s.S, likely) + (math.ceil(s.length / PROMOTED) + 2) * U32 * s.S


def _unpromoted(s: Sum) -> Tensor:
    return (6 * s.length / 32 + 8) * U_FP8 * s.S


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
        "min(25 v S, v (25 |y| + 8 sqrt(sum_b amax_x,b^2 amax_w,b^2))) + (K/128 + 2) u S, v = 2^-13",
        "13 fraction bits inside 128 products, float32 above: errors of blocks are independent",
        _promoted,
    ),
    "fp8_unpromoted": Accumulation(
        "(6 K/32 + 8) v S, v = 2^-13", "13 fraction bits over the whole sum, truncated", _unpromoted
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
