"""Every conversion between float types, on every code and on every rounding boundary, against an exact specification."""

import itertools
from fractions import Fraction

import interpreter_spec as spec
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from moeproof.harness import interpreter
from moeproof.harness.interpreter import numerics as interpreter_numerics

interpreter.install()

TORCH = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8e4nv": torch.float8_e4m3fn,
    "fp8e5": torch.float8_e5m2,
    "fp8e4b8": torch.float8_e4m3fnuz,
    "fp8e5b16": torch.float8_e5m2fnuz,
}
TL = {name: tl.str_to_ty(f"*{name}", None).element_ty for name in TORCH}
WORD = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32, 64: torch.uint64}
SMALL = [name for name in spec.SPECS if name != "fp32"]


@triton.jit
def cast(x_ptr, out_ptr, N: tl.constexpr, TYPE: tl.constexpr, MODE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i).to(TYPE, fp_downcast_rounding=MODE))


def bits(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(WORD[8 * tensor.element_size()]).numpy()


def from_bits(codes: np.ndarray, name: str) -> torch.Tensor:
    width = 8 * TORCH[name].itemsize
    return torch.from_numpy(codes.astype(f"uint{width}")).view(TORCH[name])


def converted(x: torch.Tensor, to: str, mode: str | None = None) -> np.ndarray:
    """Bits of x cast inside a kernel; padded to a power of two."""
    n = triton.next_power_of_2(x.numel())
    padded = torch.zeros(n * x.element_size(), dtype=torch.uint8).view(x.dtype)
    padded.view(torch.uint8)[: x.numel() * x.element_size()] = x.view(torch.uint8)
    out = torch.zeros(n * TORCH[to].itemsize, dtype=torch.uint8).view(TORCH[to])
    cast[(1,)](padded, out, n, TL[to], mode)
    return bits(out)[: x.numel()]


def boundaries(name: str) -> np.ndarray:
    """float64: every finite value of a format, every midpoint between two, and what lies just beside them."""
    finite = spec.table(name)
    middle = (finite[1:] + finite[:-1]) / 2
    edge = finite[-1] + (finite[-1] - finite[-2]) * np.array([0.25, 0.5, 0.75, 1.0, 4.0])
    points = np.concatenate([finite, middle, edge])
    # Beside them by one float32 ulp where float32 is the source, and by much less where float64 is.
    with np.errstate(over="ignore"):
        points32 = points.astype(np.float32)
        near32 = [np.nextafter(points32, np.float32(side)).astype(np.float64) for side in (0, np.inf)]
    near64 = [np.nextafter(points, side) for side in (0, np.inf)]
    values = np.concatenate([points, *near32, *near64, [np.inf, np.nan, 1e300]])
    return np.concatenate([values, -values])


def test_the_two_specifications_agree() -> None:
    """Search in a table and integer arithmetic on Fractions give the same code."""
    rng = np.random.default_rng(1)
    for name in SMALL:
        values = boundaries(name)
        values = rng.choice(values[np.isfinite(values)], 2000)
        by_search = spec.nearest(values, name)
        for value, code in zip(values, by_search, strict=True):
            if value != 0:
                assert spec.nearest_exact(spec.exact(value), name) == code, (name, value)
    assert spec.nearest_exact(Fraction(448), "fp8e4nv") == 0x7E
    assert spec.nearest_exact(Fraction(1), "bf16") == 0x3F80


@pytest.mark.parametrize("to", ["fp64", "fp32"])
@pytest.mark.parametrize("name", SMALL)
def test_widening_is_exact_for_every_code(name: str, to: str) -> None:
    codes = np.arange(1 << spec.SPECS[name].bits)

    with np.errstate(invalid="ignore"):  # some NaN codes are signalling
        got = converted(from_bits(codes, name), to).view(f"float{to[2:]}").astype(np.float64)

    want = spec.all_values(name)
    assert np.array_equal(np.signbit(got[~np.isnan(want)]), np.signbit(want[~np.isnan(want)]))
    assert np.array_equal(got, want, equal_nan=True)


@pytest.mark.parametrize(("source", "to"), list(itertools.permutations(SMALL, 2)))
def test_small_to_small_for_every_code(source: str, to: str) -> None:
    """One rounding from the exact value of each code, whatever lies in between."""
    codes = np.arange(1 << spec.SPECS[source].bits)

    got = converted(from_bits(codes, source), to)

    ok = spec.same(got, spec.nearest(spec.all_values(source), to), to)
    assert ok.all(), [(hex(c), hex(got[c])) for c in codes[~ok][:5]]


@pytest.mark.parametrize("mode", ["rtne", "rtz"])
@pytest.mark.parametrize("to", SMALL)
@pytest.mark.parametrize("source", ["fp32", "fp64"])
def test_narrowing_at_every_boundary(source: str, to: str, mode: str) -> None:
    values = boundaries(to)
    with np.errstate(over="ignore"):
        values = values.astype(f"float{source[2:]}")

    got = converted(torch.from_numpy(values), to, mode)

    ok = spec.same(got, spec.nearest(values, to, mode == "rtz"), to)
    assert ok.all(), [(v, hex(c)) for v, c in zip(values[~ok][:5], got[~ok][:5], strict=True)]


@pytest.mark.parametrize("mode", ["rtne", "rtz"])
def test_fp64_to_fp32(mode: str) -> None:
    rng = np.random.default_rng(2)
    some = rng.standard_normal(300).astype(np.float32).astype(np.float64)
    ulp = np.spacing(some.astype(np.float32)).astype(np.float64)
    values = np.concatenate([some, some + ulp / 2, some + ulp / 2 * (1 + 2.0**-20), some * 2.0**-130])

    got = converted(torch.from_numpy(values), "fp32", mode)

    if mode == "rtne":
        want = np.array([spec.nearest_exact(spec.exact(v), "fp32") for v in values])
        assert np.array_equal(got, want)
    else:
        back = got.view(np.float32).astype(np.float64)
        assert (np.abs(back) <= np.abs(values)).all()
        assert (np.abs(values) - np.abs(back) < np.spacing(np.abs(got.view(np.float32))).astype(np.float64)).all()


@pytest.mark.parametrize("to", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("source", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool])
def test_integers_to_floats(source: torch.dtype, to: str) -> None:
    """All values that float32 holds; beyond it the hardware rounds through float32, and so do we."""
    top = 1 if source is torch.bool else min(torch.iinfo(source).max, 2**24)
    low = 0 if source is torch.bool else max(torch.iinfo(source).min, -(2**24))
    values = np.unique(np.linspace(low, top, 1000).astype(np.int64))

    got = converted(torch.from_numpy(values).to(source), to)

    if to == "fp32":
        assert np.array_equal(got.view(np.float32), values)
    else:
        assert spec.same(got, spec.nearest(values.astype(np.float64), to), to).all()


@pytest.mark.parametrize("to", [tl.int8, tl.int32, tl.int64])
@pytest.mark.parametrize("source", ["fp16", "bf16", "fp32"])
def test_floats_to_integers_cut(source: str, to: tl.dtype) -> None:
    values = torch.tensor([0.0, 0.5, -0.5, 1.75, -1.75, 2.5, 100.0, -128.0]).to(TORCH[source])
    out = torch.zeros(8, dtype={8: torch.int8, 32: torch.int32, 64: torch.int64}[to.int_bitwidth])

    cast[(1,)](values, out, 8, to, None)

    assert out.tolist() == [0, 0, 0, 1, -1, 2, 100, -128]


def test_the_layer_rounds_float64_to_bf16_once() -> None:
    """1 + 2^-8 + 2^-40 is above the midpoint; through float32 it would fall on it and then to 1.0."""
    value = np.array([1 + 2.0**-8 + 2.0**-40])

    assert interpreter_numerics.encode(value, "bf16")[0] == 0x3F81
    assert converted(torch.from_numpy(value), "bf16")[0] == 0x3F81


@pytest.mark.parametrize(("code", "value"), [(0, 2.0**-127), (1, 2.0**-126), (127, 1.0), (254, 2.0**127), (255, float("nan"))])
def test_e8m0(code: int, value: float) -> None:
    assert np.array_equal(interpreter_numerics.decode_e8m0(np.array([code], np.uint8)), [value], equal_nan=True)


def test_e2m1_unpacks_the_low_half_first() -> None:
    packed = np.array([[0x10, 0x32], [0x54, 0xF7]], np.uint8)

    assert interpreter_numerics.decode_e2m1(packed, -1).tolist() == [[0, 0.5, 1, 1.5], [2, 3, 6, -6]]
    assert interpreter_numerics.decode_e2m1(packed, -2).tolist() == [[0, 1], [0.5, 1.5], [2, 6], [3, -6]]
