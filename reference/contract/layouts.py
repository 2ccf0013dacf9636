"""Memory layouts of scales and of packed weights, as bijections to and from the canonical form.

The harness hands every candidate the canonical form (reference.contract.inputs); a kernel that wants another one packs
first, and `unpack(pack(x))` is x again. Integers are packed by arithmetic on int32, so byte order never matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import check

Tensor = torch.Tensor


@dataclass(frozen=True)
class Layout:
    """`pack` takes the canonical tensor; `unpack` takes the packed one and the canonical shape, which it must restore."""

    name: str
    what: str
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, tuple[int, ...]], Tensor]


# bytes and nibbles


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 (.., n), any integer dtype -> uint8 (.., n / 2): the low nibble holds the even column."""
    check(codes.shape[-1] % 2 == 0, f"{codes.shape[-1]} columns do not pack two to a byte")
    pairs = codes.to(torch.int32).unflatten(-1, (-1, 2))
    return (pairs[..., 0] | (pairs[..., 1] << 4)).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of pack_nibbles: uint8 (.., n / 2) -> uint8 codes 0..15 (.., n)."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


def _int32(words: Tensor) -> Tensor:
    """Unsigned 32-bit values in int64 -> the int32 tensor with the same bits."""
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _words(codes: Tensor, order: tuple[int, ...]) -> Tensor:
    """Codes 0..15 (.., 8 n) -> int32 (.., n): nibble j of a word holds the word's code number order[j]."""
    eights = codes.to(torch.int64).unflatten(-1, (-1, 8))
    return _int32(sum(eights[..., code] << (4 * nibble) for nibble, code in enumerate(order)))


def _codes(words: Tensor, order: tuple[int, ...]) -> Tensor:
    """The inverse of _words."""
    bits = words.to(torch.int64) & 0xFFFFFFFF
    eights = torch.empty(*words.shape, 8, dtype=torch.uint8, device=words.device)
    for nibble, code in enumerate(order):
        eights[..., code] = ((bits >> (4 * nibble)) & 15).to(torch.uint8)
    return eights.flatten(-2)


# int4 weights: canonical is uint8 (e, N, K/2), two along K, offset binary (bias 8) or unsigned with a zero point

_INORDER, _AWQ = (0, 1, 2, 3, 4, 5, 6, 7), (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of a word's eight codes each nibble holds, lowest first."""


def _pack_gptq(w: Tensor) -> Tensor:
    return _words(unpack_nibbles(w), _INORDER).transpose(-1, -2).contiguous()


def _unpack_gptq(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pack_nibbles(_codes(packed.transpose(-1, -2), _INORDER)).reshape(shape)


def _pack_awq(w: Tensor) -> Tensor:
    return _words(unpack_nibbles(w).transpose(-1, -2), _AWQ)


def _unpack_awq(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    return pack_nibbles(_codes(packed, _AWQ).transpose(-1, -2)).reshape(shape)


WEIGHT_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("canonical", "uint8 (.., N, K/2): two along K, low nibble = even k", lambda w: w, lambda w, shape: w),
        Layout(
            "int32_along_k",
            "int32 (.., N, K/8): eight along K, lowest nibble = lowest k (compressed-tensors)",
            lambda w: _words(unpack_nibbles(w), _INORDER),
            lambda packed, shape: pack_nibbles(_codes(packed, _INORDER)),
        ),
        Layout("gptq", "int32 (.., K/8, N): eight along K of the (K, N) matrix, lowest nibble first", _pack_gptq, _unpack_gptq),
        Layout("awq", "int32 (.., K, N/8): eight along N, nibbles in the order 0 2 4 6 1 3 5 7", _pack_awq, _unpack_awq),
    )
}

# int8 and 6-bit weights


def _pack_six(codes: Tensor) -> Tensor:
    fours = codes.to(torch.int32).unflatten(-1, (-1, 4))
    word = sum(fours[..., i] << (6 * i) for i in range(4))
    return torch.stack([(word >> (8 * i)) & 0xFF for i in range(3)], dim=-1).flatten(-2).to(torch.uint8)


def _unpack_six(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    threes = packed.to(torch.int32).unflatten(-1, (-1, 3))
    word = threes[..., 0] | (threes[..., 1] << 8) | (threes[..., 2] << 16)
    return torch.stack([(word >> (6 * i)) & 63 for i in range(4)], dim=-1).flatten(-2).to(torch.uint8)


BYTE_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout(
            "offset128",
            "int8 stored as uint8 with bias 128",
            lambda w: (w.to(torch.int16) + 128).to(torch.uint8),
            lambda packed, shape: (packed.to(torch.int16) - 128).to(torch.int8),
        ),
        Layout("six_bit", "uint8 (.., 3K/4): four 6-bit codes in three bytes, lowest bits first", _pack_six, _unpack_six),
    )
}

# scales: canonical is row-major (.., rows, G)

TILE_ROWS, TILE_COLUMNS = 128, 4


def _pack_swizzled(s: Tensor) -> Tensor:
    """Row r = 32 a + b of a 128 x 4 tile lies at (b, a, column): NVIDIA's layout of block scales for tensor cores."""
    rows, columns = s.shape[-2:]
    tall, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padded = torch.zeros(*s.shape[:-2], tall * TILE_ROWS, wide * TILE_COLUMNS, dtype=s.dtype, device=s.device)
    padded[..., :rows, :columns] = s
    tiles = padded.unflatten(-1, (wide, TILE_COLUMNS)).unflatten(-3, (tall, 4, 32))
    # (.., tall, a, b, wide, column) -> (.., tall, wide, b, a, column)
    n = tiles.dim()
    return tiles.permute(*range(n - 5), n - 5, n - 2, n - 3, n - 4, n - 1).contiguous().flatten(-5)


def _unpack_swizzled(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    rows, columns = shape[-2:]
    tall, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    tiles = packed.unflatten(-1, (tall, wide, 32, 4, TILE_COLUMNS))
    n = tiles.dim()
    back = tiles.permute(*range(n - 5), n - 5, n - 2, n - 3, n - 4, n - 1)
    return back.reshape(*shape[:-2], tall * TILE_ROWS, wide * TILE_COLUMNS)[..., :rows, :columns]


SCALE_LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("row_major", "(.., rows, G), contiguous: canonical", lambda s: s, lambda s, shape: s),
        Layout(
            "transposed",
            "(.., G, rows), contiguous: column-major",
            lambda s: s.transpose(-1, -2).contiguous(),
            lambda packed, shape: packed.transpose(-1, -2),
        ),
        Layout(
            "swizzled_128x4",
            "flat (.., padded): tiles of 128 rows x 4 groups, 32 x 4 x 4 inside; padding is 0",
            _pack_swizzled,
            _unpack_swizzled,
        ),
    )
}
