"""Allowed errors before the final rounding, derived from length, magnitude and format. No tuned constants.

u = 2^-24 is float32's unit roundoff and S = sum |a||w| the magnitude of a sum of products. Sources: Higham, Accuracy and
Stability of Numerical Algorithms, 2nd ed., section 3.1 and 4.2 (error of sums); docs/tolerances.md (tensor cores).
"""

from __future__ import annotations

import math

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.schemes import Format

U32 = 2.0**-24
U64 = 2.0**-53
EXACT_TERMS = 2.0**24
"""A float32 holds every multiple of q up to 2^24 q, for q from its least subnormal on and below its overflow."""
LEAST, OVERFLOW = 2.0**-149, 2.0**128


def accumulator(length: int, fmt: Format, claims: Claims) -> float:
    """c with |computed - exact| <= c * S for a dot product of `length` terms with operands in `fmt`.

    float32 operands: each term passes through at most `length` roundings to nearest; roundings of random sign add up as
    sqrt(length), and the worst seen on H100 stays far below. 16-bit operands: tensor cores align and truncate each step
    of 16 terms to the step's largest exponent, which is biased, so the bound is linear: 1.5 u per step, and 8 u for what
    follows (partial sums of tiles, split-K, bias).
    """
    if claims.accumulate == "dtype":
        return length * fmt.unit
    c = min(float(length), math.sqrt(length) + 8) if fmt.name == "fp32" else 1.5 * length / 16 + 8
    if claims.accumulate == "tf32" and fmt.name == "fp32":
        # Both operands lose at most one unit in the 10th place by truncation.
        return c * U32 + 2 * 2.0**-10
    return c * U32


def proved_exact(S: torch.Tensor, quantum: float | torch.Tensor) -> torch.Tensor:
    """bool: sums of multiples of `quantum` whose magnitudes add up to S never round in float32, in whatever order.

    A tensor of S's shape gives each sum a quantum of its own.
    """
    if isinstance(quantum, torch.Tensor):
        return (quantum >= LEAST) & (EXACT_TERMS * quantum >= S) & (S < OVERFLOW)
    if not quantum >= LEAST:
        return torch.zeros_like(S, dtype=torch.bool)
    return (EXACT_TERMS * quantum >= S) & (S < OVERFLOW)


def dot_error(S: torch.Tensor, exact: torch.Tensor, length: int, quantum: float, fmt: Format, claims: Claims) -> torch.Tensor:
    """Error of the dot products `exact` with magnitudes S; 0 where every partial sum is proved exact.

    Beside the accumulator: 6 u |y| for scale and weight multiplications, and the float64 oracle's own error.
    """
    error = accumulator(length, fmt, claims) * S + 6 * U32 * exact.abs() + length * U64 * S
    return torch.where(proved_exact(S, quantum), 0.0, error) if claims.accumulate == "fp32" else error


def combine_error(S: torch.Tensor, terms: int, quantum: float | torch.Tensor, fmt: Format, claims: Claims) -> torch.Tensor:
    """Error of a weighted sum of `terms` slots with magnitude S = sum |w y|: terms products and additions, and 2 spare."""
    if claims.combine == "dtype" and fmt.name != "fp32":
        # Weight, product and each addition rounded to the stored dtype.
        return (terms + 2) * fmt.unit * S
    return torch.where(proved_exact(S, quantum), 0.0, (terms + 2) * U32 * S)
