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

    Terms are taken to be spread evenly along the sum, so that partial sums grow to S as i / length (all recipes draw so).

    float32 operands: roundings to nearest of random sign, each uniform in +-u |partial sum|, have a standard deviation of
    u S sqrt(length) / 3; six of them are 2 sqrt(length), and 8 u are for what follows (partial sums of tiles, split-K, bias).
    16-bit operands: a tensor core aligns the sum and the 16 products of a step to the largest exponent e, drops what lies
    below 2^(e-25), and truncates the result to float32 (docs/tolerances.md). That loses 16 * 2^(e-26) + 2^(e-24) on average,
    5 u |partial sum| at the most and always toward zero: 2.5 u S per step. Measured on an H100
    (docs/results/accumulators-h100.json): at most 0.74 of it for either.
    """
    if claims.accumulate == "dtype":
        return length * fmt.unit
    c = min(float(length), 2 * math.sqrt(length) + 8) if fmt.name == "fp32" else 2.5 * length / 16 + 8
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
