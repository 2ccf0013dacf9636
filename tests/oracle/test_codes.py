"""Narrow formats, exhaustively: all codes and all rounding boundaries, scalar specification and vectorised twin alike."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch

from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.oracle import codes, standard

NARROW = [f for f in FORMATS.values() if f.width <= 8]
BY_NAME = pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)

Decode = Callable[[list[int], Format], list[float]]
Round = Callable[[list[float], Format], list[float]]
Encode = Callable[[list[float], Format], list[int]]


def _scalar_decode(all_codes: list[int], fmt: Format) -> list[float]:
    return [standard.decode(c, fmt) for c in all_codes]


def _vector_decode(all_codes: list[int], fmt: Format) -> list[float]:
    return codes.from_codes(torch.tensor(all_codes, dtype=torch.uint8), fmt).tolist()


def _scalar_round(values: list[float], fmt: Format) -> list[float]:
    return [standard.round_value(v, fmt) for v in values]


def _vector_round(values: list[float], fmt: Format) -> list[float]:
    return codes.round_values(torch.tensor(values, dtype=torch.float64), fmt).tolist()


def _scalar_encode(values: list[float], fmt: Format) -> list[int]:
    return [standard.encode(v, fmt) for v in values]


def _vector_encode(values: list[float], fmt: Format) -> list[int]:
    return codes.to_codes(torch.tensor(values, dtype=torch.float64), fmt).tolist()


DECODES = pytest.mark.parametrize("decode", [_scalar_decode, _vector_decode], ids=["standard", "codes"])
ROUNDS = pytest.mark.parametrize("round_all", [_scalar_round, _vector_round], ids=["standard", "codes"])
ENCODES = pytest.mark.parametrize("encode", [_scalar_encode, _vector_encode], ids=["standard", "codes"])


def _same(a: float, b: float) -> bool:
    """Equal with the sign of zero, or both NaN."""
    return (a == b and math.copysign(1, a) == math.copysign(1, b)) or (math.isnan(a) and math.isnan(b))


def _finite(fmt: Format) -> list[float]:
    """All finite values, ascending, zero once."""
    values = {standard.decode(c, fmt) + 0.0 for c in range(2**fmt.width)}
    return sorted(v for v in values if math.isfinite(v))


ML = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
}


@DECODES
@pytest.mark.parametrize("name", ML)
def test_every_code_means_what_ml_dtypes_says(name: str, decode: Decode) -> None:
    fmt = FORMATS[name]
    every = list(range(2**fmt.width))
    theirs = np.array(every, dtype=np.uint8).view(ML[name]).astype(np.float64).tolist()

    assert all(map(_same, decode(every, fmt), theirs))


@DECODES
@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2"])
def test_every_code_means_what_torch_says(name: str, decode: Decode) -> None:
    fmt = FORMATS[name]
    every = list(range(256))
    theirs = torch.tensor(every, dtype=torch.uint8).view(fmt.dtype).double().tolist()

    assert all(map(_same, decode(every, fmt), theirs))


@DECODES
def test_e2m1_written_out(decode: Decode) -> None:
    """docs/models.md section 7: codes 0..7, bit 3 is the sign."""
    assert decode(list(range(8)), FORMATS["e2m1"]) == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@DECODES
def test_integers_written_out(decode: Decode) -> None:
    assert decode([0, 127, 128, 255], FORMATS["int8"]) == [0, 127, -128, -1]
    assert decode([0, 7, 8, 15], FORMATS["int4"]) == [-8, -1, 0, 7]
    assert decode([0, 8, 15], FORMATS["uint4"]) == [0, 8, 15]


@DECODES
def test_e8m0_has_no_zero_and_one_nan(decode: Decode) -> None:
    """Several kernels decode byte 0 by a shift into 0.0, and 255 into infinity."""
    low, one, high, nan = decode([0, 127, 254, 255], FORMATS["e8m0"])

    assert (low, one, high) == (2.0**-127, 1.0, 2.0**127) and math.isnan(nan)


@ENCODES
@BY_NAME
def test_encode_is_the_inverse_of_decode(fmt: Format, encode: Encode) -> None:
    every = [c for c in range(2**fmt.width) if math.isfinite(standard.decode(c, fmt))]

    assert encode([standard.decode(c, fmt) for c in every], fmt) == every


@ENCODES
@pytest.mark.parametrize("name", ["e4m3fn", "e4m3fnuz", "e5m2", "e8m0"])
def test_nan_has_a_code_that_decodes_to_nan(name: str, encode: Encode) -> None:
    assert math.isnan(standard.decode(encode([math.nan], FORMATS[name])[0], FORMATS[name]))


@ENCODES
def test_e5m2_keeps_infinity(encode: Encode) -> None:
    assert encode([math.inf, -math.inf], FORMATS["e5m2"]) == [0x7C, 0xFC]


@ROUNDS
@BY_NAME
def test_values_of_the_format_stay(fmt: Format, round_all: Round) -> None:
    values = [v for v in _finite(fmt) if not (fmt.name == "int8" and v == -128)]

    assert round_all(values, fmt) == values


@ROUNDS
@BY_NAME
def test_every_rounding_boundary(fmt: Format, round_all: Round) -> None:
    """Between any two neighbours: just below the midpoint, on it (to the even code), just above it."""
    values = _finite(fmt)
    if fmt.name == "int8":
        values = values[1:]  # quantisers saturate at -127
    pairs = list(itertools.pairwise(values))
    middles = [(a + b) / 2 for a, b in pairs]
    below = round_all([math.nextafter(m, -math.inf) for m in middles], fmt)
    on = round_all(middles, fmt)
    above = round_all([math.nextafter(m, math.inf) for m in middles], fmt)

    for (a, b), low, tie, high in zip(pairs, below, on, above, strict=True):
        assert (low, high) == (a, b)
        if fmt.name == "e8m0":
            assert tie == b
        elif fmt.integer:
            assert tie == (a if a % 2 == 0 else b)
        else:
            even = a if standard.encode(a, fmt) % 2 == 0 else b
            assert tie == even, (a, b)


@ROUNDS
@BY_NAME
def test_saturation_and_signed_zero(fmt: Format, round_all: Round) -> None:
    low = {"e8m0": fmt.min, "int8": -127.0, "int4": -8.0, "uint4": 0.0}.get(fmt.name, -fmt.max)
    assert round_all([math.inf, -math.inf, 1e30 if fmt.name != "e8m0" else 2.0**200], fmt) == [fmt.max, low, fmt.max]
    if fmt.name == "e8m0":
        return
    negative = round_all([-0.0], fmt)[0]
    keeps = not fmt.integer and fmt.specials != "fnuz"
    assert negative == 0 and (math.copysign(1, negative) < 0) == keeps


@ROUNDS
@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "e2m1", "e3m2", "e2m3"])
def test_rounding_agrees_with_ml_dtypes_from_float32(name: str, round_all: Round) -> None:
    """From float32 ml_dtypes rounds once; from float64 it rounds twice, which is why we do not use it."""
    fmt = FORMATS[name]
    values = (torch.randn(4000, generator=torch.Generator().manual_seed(1)) * fmt.max / 4).clamp(-fmt.max, fmt.max)
    theirs = values.numpy().astype(ML[name]).astype(np.float64).tolist()

    assert all(map(_same, round_all(values.double().tolist(), fmt), theirs))


def test_one_rounding_where_the_libraries_round_twice() -> None:
    """2^-30 above a tie of e4m3: float32 drops it, and the tie then goes to the even code below."""
    fmt, x = FORMATS["e4m3fn"], 1.0625 + 2.0**-30

    assert float(np.float64(x).astype(ml_dtypes.float8_e4m3fn)) == 1.0
    assert torch.tensor(x, dtype=torch.float64).to(torch.float8_e4m3fn).item() == 1.0
    assert standard.round_value(x, fmt) == 1.125
    assert codes.round_values(torch.tensor([x], dtype=torch.float64), fmt).item() == 1.125


@BY_NAME
def test_store_and_load_are_inverse(fmt: Format) -> None:
    every = torch.arange(2**fmt.width, dtype=torch.uint8)
    values = codes.from_codes(every, fmt)
    values = values[values.isfinite()]
    values = values[: len(values) // 2 * 2].view(2, -1)
    if fmt.per_byte == 2:
        values = values[:, : values.shape[1] // 2 * 2]
    stored = codes.store(values, fmt)

    assert stored.dtype == fmt.dtype and stored.shape[-1] * fmt.per_byte == values.shape[-1]
    assert torch.equal(codes.load(stored, fmt), values)
    assert torch.equal(codes.load(stored.T.contiguous().T, fmt), values)


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2", "fp16", "bf16"])
def test_scalar_without_saturation_overflows_as_the_standard_says(name: str) -> None:
    fmt = FORMATS[name]
    over = standard.round_value(fmt.max * 2, fmt, saturate=False)

    assert math.isnan(over) if fmt.specials == "fn" else over == math.inf
