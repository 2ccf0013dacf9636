"""Layouts of scales and packed weights: every one is a bijection, and puts known codes where the hardware reads them."""

from __future__ import annotations

import math

import pytest
import torch

from moeproof.reference.contract.layouts import BYTE_LAYOUTS, SCALE_LAYOUTS, WEIGHT_LAYOUTS, pack_nibbles, unpack_nibbles


def _every_code(shape: tuple[int, ...], width: int) -> torch.Tensor:
    return (torch.arange(math.prod(shape)) * 7 % 2**width).to(torch.uint8).view(shape)


def test_nibbles_low_is_the_even_column() -> None:
    packed = pack_nibbles(torch.tensor([[1, 2, 3, 15]]))

    assert packed.tolist() == [[0x21, 0xF3]]
    assert unpack_nibbles(packed).tolist() == [[1, 2, 3, 15]]


@pytest.mark.parametrize("name", WEIGHT_LAYOUTS)
def test_weight_layouts_round_trip(name: str) -> None:
    w = pack_nibbles(_every_code((2, 16, 24), 4))
    layout = WEIGHT_LAYOUTS[name]

    assert torch.equal(layout.unpack(layout.pack(w), tuple(w.shape)), w)


def test_weight_layouts_place_known_codes() -> None:
    codes = torch.arange(8, dtype=torch.uint8)
    along_k, along_n = pack_nibbles(codes.view(1, 8)), pack_nibbles(codes.view(8, 1).expand(8, 2))

    assert WEIGHT_LAYOUTS["int32_along_k"].pack(along_k).item() == 0x76543210
    assert WEIGHT_LAYOUTS["gptq"].pack(along_k).item() == 0x76543210
    # nibbles from low to high hold columns 0 2 4 6 1 3 5 7
    assert WEIGHT_LAYOUTS["awq"].pack(along_n)[0].item() == 0x75316420


@pytest.mark.parametrize("name", BYTE_LAYOUTS)
def test_byte_layouts_round_trip(name: str) -> None:
    w = _every_code((3, 5, 64), 6)
    if name == "offset128":
        w = torch.arange(-128, 128).to(torch.int8).view(4, 64)
    layout = BYTE_LAYOUTS[name]
    packed = layout.pack(w)

    assert torch.equal(layout.unpack(packed, tuple(w.shape)), w)
    assert packed.dtype == torch.uint8
    assert packed.numel() == (w.numel() if name == "offset128" else w.numel() * 3 // 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(1, 1), (130, 5), (2, 128, 4), (3, 257, 9)])
@pytest.mark.parametrize("name", SCALE_LAYOUTS)
def test_scale_layouts_round_trip(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    s = (torch.arange(math.prod(shape)) % 120).view(shape).to(torch.uint8)
    s = s.view(dtype) if dtype == torch.float8_e4m3fn else s.to(dtype)
    layout = SCALE_LAYOUTS[name]
    back = layout.unpack(layout.pack(s), shape)

    assert back.shape == s.shape and torch.equal(back.contiguous().view(torch.uint8), s.contiguous().view(torch.uint8))


def test_the_swizzle_puts_a_row_where_the_hardware_reads_it() -> None:
    """Byte (r mod 32) * 16 + (r div 32) * 4 + c of a 128 x 4 tile; tiles go along the groups first."""
    rows, groups = 200, 6
    s = torch.arange(rows * groups).view(rows, groups)
    packed = SCALE_LAYOUTS["swizzled_128x4"].pack(s)

    for r, g in ((0, 0), (33, 2), (127, 3), (128, 4), (199, 5)):
        tile = (r // 128) * 2 + g // 4
        assert packed[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + g % 4] == s[r, g]
