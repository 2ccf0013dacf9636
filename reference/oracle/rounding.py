"""Rounding from float64, written out: torch's float64 casts to bf16 and fp8 go through float32 and round twice."""

from __future__ import annotations

import torch

from moeproof.reference.contract.schemes import Format


def power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exact float64 2^exponent for int64 exponents in [-1022, 1023], built from its bits (pow may be off by an ulp)."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exponent_of(x: torch.Tensor) -> torch.Tensor:
    """floor(log2|x|) of float64 x as int64; -1023 for zero and float64 subnormals, 1024 for inf and NaN."""
    return ((x.view(torch.int64) >> 52) & 0x7FF) - 1023


def ulp(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Distance between neighbours of `fmt` at |x|: 2^(max(floor(log2|x|), emin) - bits). Overflow keeps emax's."""
    return power_of_two(exponent_of(x.contiguous()).clamp(fmt.emin, fmt.emax)) * 2.0**-fmt.bits  # fp64's least is subnormal


def round_to(x: torch.Tensor, fmt: Format) -> torch.Tensor:
    """float64 x rounded once to the nearest value of `fmt`, ties to even, subnormals kept, overflow to infinity.

    Dividing by a power of two is exact, torch.round is half-to-even (IEEE 754-2019 section 4.3.1).
    """
    if fmt.dtype == torch.float64:
        return x
    step = ulp(x, fmt)
    rounded = torch.round(x / step) * step
    return torch.where(rounded.abs() > fmt.max, torch.copysign(torch.full_like(x, torch.inf), x), rounded)


def quanta(x: torch.Tensor) -> torch.Tensor:
    """Largest power of two that divides each element of float64 x; inf for zeros, 0 for what is not finite."""
    flat = x.contiguous().view(torch.int64)
    mantissa = flat & ((1 << 52) - 1)
    exponent = (flat >> 52) & 0x7FF
    whole = torch.where(exponent > 0, mantissa | (1 << 52), mantissa)
    lowest = (whole & -whole).double()
    quantum = lowest * 2.0**-52 * power_of_two(exponent.clamp(min=1, max=2046) - 1023)
    quantum = torch.where(whole == 0, torch.full_like(quantum, torch.inf), quantum)
    return torch.where(exponent == 0x7FF, 0.0, quantum)


def lowest_bit(x: torch.Tensor) -> float:
    """Largest power of two that divides every element of float64 x; inf where all are zero, 0 where one is not finite.

    With it a sum can be proved exact: products of multiples of p and q are multiples of p*q, and float32 holds every
    multiple of p*q up to 2^24 * p*q, so partial sums never round, whatever their order.
    """
    return float(quanta(x).min()) if x.numel() else float("inf")
