"""Codes of narrow formats, vectorised: float64 value <-> stored code. The specification is `standard`, number by number.

Everything works from float64 with a single rounding: torch's own casts from float64 go through float32 and round twice.
"""

from __future__ import annotations

import torch

from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.layouts import pack_nibbles, unpack_nibbles
from moeproof.reference.oracle.rounding import exponent_of, power_of_two, round_to

Tensor = torch.Tensor


def saturate(x: Tensor, fmt: Format) -> Tensor:
    """float64 x clamped to the range that quantisers use of `fmt`."""
    return x.clamp(fmt.low, fmt.max)


def round_values(x: Tensor, fmt: Format) -> Tensor:
    """float64 x saturated, then rounded once to the nearest value of `fmt`, ties to even. NaN stays NaN."""
    if fmt.name == "e8m0":
        below = power_of_two(exponent_of(x.contiguous()).clamp(fmt.emin, fmt.emax))
        nearest = torch.where(x < 1.5 * below, below, 2 * below).clamp(fmt.min, fmt.max)
        nearest = torch.where(x > fmt.min, nearest, fmt.min)
        return torch.where(x.isnan(), x, nearest)
    if fmt.integer:
        return torch.round(saturate(x, fmt)) + 0.0  # -0 + 0 = +0
    rounded = round_to(saturate(x, fmt), fmt)
    return rounded + 0.0 if fmt.specials == "fnuz" else rounded


def to_codes(value: Tensor, fmt: Format) -> Tensor:
    """float64 values of `fmt` -> their codes, uint8, one per element (unpacked). NaN where the format has one."""
    if fmt.integer:
        return (value.to(torch.int16) + fmt.offset).to(torch.int8 if fmt.name == "int8" else torch.uint8).view(torch.uint8)
    exponent = exponent_of(value.contiguous()).clamp(min=fmt.emin, max=fmt.emax)
    if fmt.name == "e8m0":
        return torch.where(value.isnan(), 255, exponent + fmt.bias).to(torch.uint8)
    # Steps of the ulp at |value|: 2^bits and more for normal values, whose exponent field therefore starts at 1.
    steps = (value.abs() / power_of_two(exponent) * 2.0**fmt.bits).nan_to_num(0.0, posinf=2.0 ** (fmt.bits + 1)).to(torch.int64)
    magnitude = steps + ((exponent - fmt.emin) << fmt.bits)
    code = magnitude + (value.signbit().to(torch.int64) << (fmt.width - 1))
    if fmt.specials != "none":
        nan = 1 << (fmt.width - 1) if fmt.specials == "fnuz" else (1 << (fmt.width - 1)) - 1
        code = torch.where(value.isnan(), nan, code)
    return code.to(torch.uint8)


def from_codes(codes: Tensor, fmt: Format) -> Tensor:
    """uint8 codes, one per element (unpacked) -> float64 values."""
    code = codes.to(torch.int64)
    if fmt.integer:
        signed = torch.where(code >= 128, code - 256, code) if fmt.name == "int8" else code - fmt.offset
        return signed.double()
    if fmt.name == "e8m0":
        return torch.where(code == 255, torch.nan, power_of_two(code.clamp(max=254) - fmt.bias))
    magnitude = code & ((1 << (fmt.width - 1)) - 1)
    field, mantissa = magnitude >> fmt.bits, magnitude & ((1 << fmt.bits) - 1)
    steps = mantissa + ((field > 0).to(torch.int64) << fmt.bits)
    value = steps.double() * power_of_two(field.clamp(min=1) - 1 + fmt.emin - fmt.bits)
    value = torch.where(code >> (fmt.width - 1) == 1, -value, value)
    if fmt.specials == "ieee":
        top = field == (1 << (fmt.width - 1 - fmt.bits)) - 1
        value = torch.where(
            top, torch.where(mantissa > 0, torch.nan, torch.copysign(torch.full_like(value, torch.inf), value)), value
        )
    elif fmt.specials == "fn":
        value = torch.where(magnitude == (1 << (fmt.width - 1)) - 1, torch.nan, value)
    elif fmt.specials == "fnuz":
        value = torch.where(code == 1 << (fmt.width - 1), torch.nan, value)
    return value


def store(value: Tensor, fmt: Format) -> Tensor:
    """float64 values of `fmt` as a tensor is stored: its own dtype, or uint8 codes, packed where two share a byte."""
    if fmt.dtype.is_floating_point and fmt.dtype.itemsize > 1:
        return value.to(fmt.dtype)
    codes = to_codes(value, fmt)
    return pack_nibbles(codes) if fmt.per_byte == 2 else codes.view(fmt.dtype)


def load(stored: Tensor, fmt: Format) -> Tensor:
    """The inverse of `store`: float64 values, any strides."""
    if fmt.dtype.is_floating_point and fmt.dtype.itemsize > 1:
        return stored.double()
    codes = stored.contiguous().view(torch.uint8)
    return from_codes(unpack_nibbles(codes) if fmt.per_byte == 2 else codes, fmt)
