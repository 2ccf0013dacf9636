"""GEMM1 and GEMM2 on quantised operands: exact sums of decoded values, and the allowed error of computing them.

The two sources of error stay apart: quantising is judged on bits (quant_stages), so a product is judged on the values that
its own codes stand for, and its bound knows nothing of rounding to codes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.bounds import EXACT_TERMS, LEAST, OVERFLOW, U32, U64, accumulator
from moeproof.reference.oracle.experts import by_expert, local_ids
from moeproof.reference.oracle.quant_stages import weight
from moeproof.reference.oracle.quantise import Quantised
from moeproof.reference.oracle.rounding import lowest_bit, quanta, round_to

Tensor = torch.Tensor
U_FP8 = 2.0**-13
"""Hopper FP8 tensor cores keep 13 fraction bits below a step's largest exponent (docs/tolerances.md section 5)."""
PROMOTED = 128
"""Terms after which fp8_promoted adds its partial sum in float32."""
SCALING = 4
"""float32 roundings of each partial sum that scales bring: conversion, two scales, and their addition."""


@dataclass(frozen=True)
class Operand:
    """One side of a product: float64 values (rows, A), and what they are made of.

    `fmt` is the format that enters the multiplier; `groups` counts the scale groups along A (1: scales leave the sum alone).
    """

    values: Tensor
    fmt: Format
    groups: int = 1
    quantised: bool = True

    def of(self, rows: Tensor) -> Operand:
        return Operand(self.values[rows], self.fmt, self.groups, self.quantised)


def plain(values: Tensor, fmt: Format) -> Operand:
    """An operand in the problem's dtype."""
    return Operand(values.double(), fmt, 1, False)


def decoded(q: Quantised) -> Operand:
    return Operand(q.values, q.quantiser.format, q.quantiser.groups(q.q.shape[-1]))


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


def accumulation_error(x: Operand, w: Operand, S: Tensor, exact: Tensor, dtype: Format, claims: Claims) -> Tensor:
    """Error of summing the products, before any is proved exact. Formulas and constants: docs/tolerances.md 7.3."""
    length = x.values.shape[-1]
    groups = max(x.groups, w.groups)
    kind = accumulator_class(x.fmt, w.fmt, claims)
    if kind == "int32":
        return (groups if groups > 1 else 0) * U32 * S  # each group's sum is exact; groups are added in float32
    if kind == "fp8_promoted":
        blocks = math.ceil(length / PROMOTED)
        tail = (blocks + 2) * U32 * S
        worst = _blocks(x.values, PROMOTED) ** 2 @ (_blocks(w.values, PROMOTED) ** 2).T
        likely = U_FP8 * (10 * exact.abs() + 8 * worst.sqrt())
        return torch.minimum(10 * U_FP8 * S, likely) + tail
    if kind == "fp8_unpromoted":
        return (6 * length / 32 + 8) * U_FP8 * S
    wide = dtype if not (x.quantised and w.quantised) else FORMATS["bf16"]
    return accumulator(length, wide, Claims(accumulate=kind)) * S


def product(x: Operand, w: Operand, dtype: Format, claims: Claims, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(exact, error), float64 (rows of x, rows of w): x w^T (+ bias), and how far float32 arithmetic may be from it."""
    kind = accumulator_class(x.fmt, w.fmt, claims)
    if claims.decode == "dtype" and not x.quantised:
        w = Operand(round_to(w.values, dtype), dtype, 1)
    exact = x.values @ w.values.T
    S = x.values.abs() @ w.values.abs().T
    quantum = quanta(x.values).amin(dim=-1)[:, None] * quanta(w.values).amin(dim=-1)[None]
    error = accumulation_error(x, w, S, exact, dtype, claims) + x.values.shape[-1] * U64 * S
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
    return exact, torch.where(proved | (S == 0), 0.0, error)


def grouped(
    inputs: Inputs, name: str, x_TKA: Operand, bias_eB: Tensor | None, claims: Claims, width: int
) -> tuple[Tensor, Tensor]:
    """(exact, error), float64 (T, K, width): each row times its own expert's quantised weights. Zero where not live."""
    local = local_ids(inputs)
    exact = torch.zeros(*local.shape, width, dtype=torch.float64, device=inputs.device)
    error = torch.zeros_like(exact)
    for expert, tokens, slots in by_expert(local, inputs.w1.shape[0]):
        rows = Operand(x_TKA.values[tokens, slots], x_TKA.fmt, x_TKA.groups, x_TKA.quantised)
        bias = None if bias_eB is None else bias_eB[expert]
        w = decoded(weight(inputs, name, expert))
        exact[tokens, slots], error[tokens, slots] = product(rows, w, inputs.problem.fmt, claims, bias)
    return exact, error
