"""round_to, ulp and their helpers against IEEE 754 read with exact fractions, and against the codes of each format."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch

from moeproof.reference.contract.schemes import FORMATS, Format
from moeproof.reference.oracle.rounding import exponent_of, lowest_bit, power_of_two, round_to, ulp

from .scalar import rounded

INF = math.inf
CODES = {
    "bf16": (torch.int16, 0x7F80, 0),
    "fp16": (torch.int16, 0x7C00, 0),
    "fp32": (torch.int32, 0x7F800000, 0),
    "tf32": (torch.int32, 0x7F800000 >> 13, 13),
}
"""The integer that holds a code, the code of infinity, and how many low bits of the integer are not used: finite non-negative
values are the codes below it, in order."""
SMALL = ("bf16", "fp16")


def at(codes: torch.Tensor, fmt: Format) -> torch.Tensor:
    """float64 values of non-negative codes."""
    dtype, _, unused = CODES[fmt.name]
    return (codes << unused).to(dtype).view(fmt.dtype).double()


def codes_of(fmt: Format) -> torch.Tensor:
    """All finite non-negative codes; for fp32 the ends of every binade and a spread of others."""
    infinity = CODES[fmt.name][1]
    if fmt.name != "fp32":
        return torch.arange(infinity)
    edges = torch.arange(0, infinity, 1 << 23)
    near = (edges[:, None] + torch.tensor([-2, -1, 0, 1, 2, 3])).flatten()
    spread = torch.arange(0, infinity, 99_991)
    return torch.cat([near[(near >= 0) & (near < infinity)], spread, torch.tensor([infinity - 1])])


def same_bits(got: torch.Tensor, want: torch.Tensor) -> bool:
    return torch.equal(got.view(torch.int64), want.view(torch.int64))


@pytest.mark.parametrize("name", SMALL)
def test_every_16_bit_value_is_its_own_rounding(name: str) -> None:
    fmt = FORMATS[name]
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(fmt.dtype).double()
    number = ~every.isnan()
    got = round_to(every, fmt)

    assert same_bits(got[number], every[number])
    assert bool(got[~number].isnan().all())


@pytest.mark.parametrize("name", CODES)
def test_midpoints_go_to_the_even_code_and_their_neighbours_to_the_nearer(name: str) -> None:
    """No arithmetic of ours on the expected side: neighbours are neighbouring codes, ties go to the even one."""
    fmt = FORMATS[name]
    codes = codes_of(fmt)
    below, above = at(codes, fmt), at(codes + 1, fmt)
    # Past the largest value comes infinity, which rounding treats as the next number of the binade (IEEE 754 4.3.1).
    numeric_above = torch.where(above.isinf(), 2.0 ** (fmt.emax + 1), above)
    middle = below + (numeric_above - below) / 2
    even = torch.where(codes % 2 == 0, below, above)
    inf, zero = torch.tensor(INF, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for sign in (1.0, -1.0):
        assert same_bits(round_to(sign * middle, fmt), sign * even)
        assert same_bits(round_to(sign * torch.nextafter(middle, zero), fmt), sign * below)
        assert same_bits(round_to(sign * torch.nextafter(middle, inf), fmt), sign * above)


def traps(fmt: Format) -> list[float]:
    """Points that rounding twice, flushing subnormals or saturating would get wrong, and a spread of ordinary ones."""
    half, last = 2.0 ** -(fmt.bits + 1), 2.0**-fmt.bits
    points = [s * 2.0**e for s in (1 + half, 1 + last + half) for e in (fmt.emin - 3, fmt.emin, -1, 0, 1, fmt.emax)]
    points = [p * (1 + d * 2.0**-k) for p in points for k in (20, 24, 25, 30, 40, 52) for d in (-1, 0, 1)]
    points += [1 + 2**-8 + 2**-40, 1 + 2**-11 + 2**-40, 1 + 2**-24 + 2**-50]
    tiny = 2.0 ** (fmt.emin - fmt.bits)
    points += [tiny * f for f in (0.25, 0.5, 0.5 + 2**-53, 0.75, 1.0, 1.5, 2.5, 2.5 + 2**-50, 3.5)]
    points += [fmt.max, fmt.max + 2.0 ** (fmt.emax - fmt.bits - 1), 2.0 ** (fmt.emax + 1), 1e300, 5e-324, 2.0**-1022, 0.0, INF]
    rng = random.Random(7)
    points += [rng.uniform(1, 2) * 2.0 ** rng.randint(fmt.emin - fmt.bits - 2, fmt.emax + 1) for _ in range(1500)]
    return points


@pytest.mark.parametrize("name", CODES)
def test_round_to_agrees_with_exact_fractions(name: str) -> None:
    fmt = FORMATS[name]
    points = [sign * p for p in traps(fmt) for sign in (1.0, -1.0)]
    want = torch.tensor([rounded(p, fmt) for p in points], dtype=torch.float64)

    assert same_bits(round_to(torch.tensor(points, dtype=torch.float64), fmt), want)


@pytest.mark.parametrize(("name", "dtype"), [("fp16", np.float16), ("fp32", np.float32)])
def test_round_to_agrees_with_numpy(name: str, dtype: type) -> None:
    """numpy rounds float64 to float16 and float32 once, as the hardware does."""
    fmt = FORMATS[name]
    x = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x * 2.0 ** torch.randint(fmt.emin - fmt.bits - 1, fmt.emax, x.shape, generator=torch.Generator().manual_seed(1))
    with np.errstate(over="ignore", under="ignore"):
        want = torch.from_numpy(x.numpy().astype(dtype).astype(np.float64))

    assert same_bits(round_to(x, fmt), want)


def test_torch_and_numpy_witness_the_spec_itself() -> None:
    """The fraction spec against numpy's float16, so that one mistake of ours cannot hide on both sides."""
    for point in traps(FORMATS["fp16"]):
        with np.errstate(over="ignore", under="ignore"):
            assert rounded(point, FORMATS["fp16"]) == float(np.float16(point)), point


def test_the_double_rounding_trap_is_real() -> None:
    """1 + 2^-8 + 2^-40 is above the bf16 midpoint; through float32 it becomes the midpoint and goes down to 1."""
    x = torch.tensor([1 + 2**-8 + 2**-40], dtype=torch.float64)

    assert x.to(torch.float32).to(torch.bfloat16).item() == 1.0
    assert round_to(x, FORMATS["bf16"]).item() == 1 + 2**-7


@pytest.mark.parametrize("name", CODES)
def test_round_to_keeps_nan_shape_and_strides_of_empty_and_strided_tensors(name: str) -> None:
    fmt = FORMATS[name]
    wide = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    assert torch.equal(round_to(wide[:, ::3], fmt), round_to(wide, fmt)[:, ::3])
    assert torch.equal(round_to(wide.T, fmt), round_to(wide, fmt).T)
    assert round_to(wide[:0], fmt).shape == (0, 8)
    assert bool(round_to(torch.tensor([math.nan], dtype=torch.float64), fmt).isnan().all())


def test_fp64_is_left_alone() -> None:
    x = torch.tensor([0.1, -0.0, 5e-324, INF], dtype=torch.float64)

    assert same_bits(round_to(x, FORMATS["fp64"]), x)


@pytest.mark.parametrize("name", CODES)
def test_ulp_is_the_gap_to_the_next_code(name: str) -> None:
    fmt = FORMATS[name]
    codes = codes_of(fmt)
    codes = codes[codes < CODES[name][1] - 1]
    here = at(codes, fmt)
    gap = at(codes + 1, fmt) - here

    assert torch.equal(ulp(here, fmt), gap)
    assert torch.equal(ulp(-here, fmt), gap)
    # Between two neighbours too: just below the next one the gap is still this one.
    assert torch.equal(ulp(torch.nextafter(here + gap, here), fmt), gap)


@pytest.mark.parametrize("name", FORMATS)
def test_ulp_at_the_ends(name: str) -> None:
    fmt = FORMATS[name]
    largest, smallest = 2.0 ** (fmt.emax - fmt.bits), math.ldexp(1.0, fmt.emin - fmt.bits)
    x = torch.tensor([fmt.max, -INF, INF, 0.0, -0.0, 5e-324, math.ldexp(1.0, fmt.emin)], dtype=torch.float64)

    assert ulp(x, fmt).tolist() == [largest] * 3 + [smallest] * 4


def test_ulp_of_fp64_agrees_with_math() -> None:
    points = [1.0, 1.5, 0.1, 1e300, 1e-300, 1e-310, 5e-324, 0.0, 2.0**-1022]

    assert ulp(torch.tensor(points, dtype=torch.float64), FORMATS["fp64"]).tolist() == [math.ulp(p) for p in points]


def test_power_of_two_over_its_whole_range() -> None:
    exponents = torch.arange(-1022, 1024)

    assert power_of_two(exponents).tolist() == [math.ldexp(1.0, e) for e in range(-1022, 1024)]


def test_exponent_of() -> None:
    rng = random.Random(5)
    normal = [rng.choice((1, -1)) * rng.uniform(1, 2) * 2.0 ** rng.randint(-1022, 1022) for _ in range(2000)]
    normal += [1.0, math.nextafter(1.0, 0), math.nextafter(2.0, 0), 2.0**-1022, 1.7976931348623157e308]
    got = exponent_of(torch.tensor(normal, dtype=torch.float64))
    special = exponent_of(torch.tensor([0.0, -0.0, 5e-324, 2.0**-1023, INF, -INF, math.nan], dtype=torch.float64))

    assert got.tolist() == [math.frexp(x)[1] - 1 for x in normal]
    assert special.tolist() == [-1023] * 4 + [1024] * 3


def lowest(x: float) -> float:
    """The largest power of two that divides x, from its exact fraction."""
    n, d = x.as_integer_ratio()
    return float(Fraction(n & -n, d))


HARD = [
    1.0,
    1.5,
    3.0,
    -96.0,
    0.1,
    2.0**-1022,
    5e-324,
    3 * 5e-324,
    2.0**-1060,
    2.0**1023,
    1.5 * 2.0**1000,
    1.7976931348623157e308,
]


def test_lowest_bit_of_single_numbers() -> None:
    rng = random.Random(9)
    numbers = HARD + [
        rng.choice((1, -1)) * rng.getrandbits(rng.randint(1, 53)) * 2.0 ** rng.randint(-1074, 970) for _ in range(2000)
    ]
    for x in numbers:
        if x:
            assert lowest_bit(torch.tensor([x], dtype=torch.float64)) == lowest(x), x


def test_lowest_bit_of_many_is_the_least_and_divides_all() -> None:
    rng = random.Random(11)
    for _ in range(200):
        numbers = [rng.randint(-99, 99) * 2.0 ** rng.randint(-20, 20) for _ in range(rng.randint(1, 9))]
        want = min((lowest(x) for x in numbers if x), default=INF)
        got = lowest_bit(torch.tensor(numbers, dtype=torch.float64))

        assert got == want
        if got != INF:
            assert all(Fraction(x) % Fraction(got) == 0 for x in numbers)


@pytest.mark.parametrize(
    ("numbers", "want"),
    [
        ([], INF),
        ([0.0, -0.0], INF),
        ([0.0, 6.0], 2.0),
        ([1.0, INF], 0.0),
        ([-INF], 0.0),
        ([0.0, math.nan], 0.0),
    ],
)
def test_lowest_bit_of_nothing_zeros_and_non_finite(numbers: list[float], want: float) -> None:
    assert lowest_bit(torch.tensor(numbers, dtype=torch.float64)) == want


def test_lowest_bit_reads_strided_tensors() -> None:
    wide = torch.tensor([[4.0, 0.1, 12.0], [8.0, 0.1, 6.0]], dtype=torch.float64)

    assert lowest_bit(wide[:, ::2]) == 2.0
