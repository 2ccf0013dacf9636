"""Codes in kernels: every code read, every rounding boundary and its neighbours written."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import plain_quant
import pytest
import torch
import triton
import triton.language as tl
from plain_layer import DEVICE

from moeproof.optimized.quant import codes
from moeproof.reference.contract.formats import FORMATS

Tensor = torch.Tensor
FLOATS = ("e4m3fn", "e2m1", "e3m2", "e2m3")


@triton.jit
def _decode(x, out, n, FMT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, codes.decode(tl.load(x + i, mask=i < n, other=0), FMT), mask=i < n)


@triton.jit
def _encode(x, out, n, FMT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, codes.encode(tl.load(x + i, mask=i < n, other=0.0), FMT), mask=i < n)


def encoded(values: Tensor, name: str) -> list[int]:
    out = torch.empty(values.numel(), dtype=torch.int32, device=DEVICE)
    block = triton.next_power_of_2(values.numel())
    _encode[(1,)](values.to(DEVICE), out, values.numel(), FMT=FORMATS[name], BLOCK=block)
    return out.tolist()


def neighbours(x: Tensor) -> Tensor:
    """float32 x with both neighbours of each, and all of that negated."""
    up, down = (torch.nextafter(x, torch.tensor(end)) for end in (math.inf, -math.inf))
    every = torch.cat([x, up, down])
    return torch.cat([every, -every])


@pytest.mark.parametrize("name", [*FLOATS, "e8m0", "int8", "int4", "uint4"])
def test_every_code_is_read(name: str) -> None:
    every = list(range(2 ** FORMATS[name].width))
    given = torch.tensor(every, dtype=torch.uint8)
    out = torch.empty(len(every), device=DEVICE)
    if name == "int8":
        given = given.view(torch.int8)
    _decode[(1,)](given.to(DEVICE), out, len(every), FMT=FORMATS[name], BLOCK=triton.next_power_of_2(len(every)))
    want = torch.tensor([plain_quant.decode(c, name) for c in every])

    assert torch.equal(out.cpu().nan_to_num(nan=1e30), want.nan_to_num(nan=1e30))
    assert torch.equal(out.cpu().signbit()[~want.isnan()], want.signbit()[~want.isnan()])


@pytest.mark.parametrize("name", FLOATS)
def test_every_boundary_is_rounded(name: str) -> None:
    """Values, midpoints between them, what lies beside both, zero, subnormals of float32, and what saturates."""
    values = torch.tensor(plain_quant.magnitudes(name))
    midpoints = (values[1:] + values[:-1]) / 2
    x = neighbours(torch.cat([values, midpoints, torch.tensor([2.0**-149, 2.0**-127, 1e38, math.inf]), values[-1:] * 1.04]))

    assert encoded(x, name) == [plain_quant.encode(v, name) for v in x.tolist()]


def test_integers_are_rounded_to_even_and_clamped() -> None:
    x = neighbours(torch.cat([torch.arange(0, 130, 0.5), torch.tensor([1e38, math.inf, 2.0**-149])]))

    assert [c & 255 for c in encoded(x, "int8")] == [plain_quant.encode(v, "int8") for v in x.tolist()]


def test_nan_has_one_code_whatever_its_bits() -> None:
    bits = torch.tensor([0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1], dtype=torch.int32)
    for name, want in (("e4m3fn", 0x7F), ("e2m1", 7), ("e3m2", 31), ("int8", 0)):
        assert encoded(bits.view(torch.float32), name) == [want] * 5
