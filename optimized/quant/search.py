"""Tiles and strips that the fused fp8 layer may use: what ci/fp8_probe.py times, and `moeproof tune` searches.

All of it compiles for sm_90 without spilling (ci/kernel_resources.py). Two sums take twice the registers of one, so the large
tiles exist only where the tensor core keeps the sum (`fast`).
"""

from __future__ import annotations

from dataclasses import replace

from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip

EVERY = (
    # Bound by weight bytes.
    *("16x32x128-g1-w4-s5", "16x64x128-g1-w4-s4", "16x64x128-g1-w4-s6", "16x128x128-g1-w4-s4", "16x64x128-g1-w4-s5-tma"),
    *("16x128x128-g1-w4-s4-tma", "16x64x128-g1-w4-s4-swap", "16x64x128-g1-w4-s6-swap", "16x128x128-g1-w4-s4-swap"),
    *("16x64x128-g1-w4-s6-tma-swap", "16x128x128-g1-w4-s4-tma-swap", "16x128x128-g1-w4-s6-tma-swap"),
    *("32x64x128-g1-w4-s4", "32x64x128-g1-w4-s5-swap", "32x64x128-g1-w4-s6-tma-swap", "32x128x128-g1-w4-s5-tma-swap"),
    *("32x128x128-g1-w4-s4-swap", "32x128x128-g1-w4-s4"),
    # The ridge.
    *("64x64x128-g1-w4-s4", "64x128x128-g4-w4-s3", "64x128x128-g4-w4-s4-tma", "64x128x128-g4-w4-s4-tma-swap"),
    *("64x128x128-g4-w4-s3-tma-p2", "64x128x128-g4-w4-s3-tma-p3", "64x128x128-g4-w8-s3-tma-p2"),
    # Bound by the tensor cores.
    *("128x128x128-g8-w8-s3", "128x128x128-g8-w8-s4-tma", "128x128x128-g8-w8-s4-tma-p1", "128x128x128-g8-w8-s6-tma-p1"),
    *("128x128x128-g8-w8-s4-tma-p1-flat",),
)
"""For every scheme and both products."""
GROUPS = (
    *("16x256x128-g1-w4-s3", "16x256x128-g1-w4-s4-tma-swap", "16x256x128-g1-w8-s4-tma-swap", "32x256x128-g1-w8-s4-tma-swap"),
    *("64x256x128-g4-w8-s3-tma", "64x256x128-g4-w8-s4-tma-p1", "64x256x128-g4-w8-s4-tma-p1-bulk", "64x256x128-g4-w8-s3"),
    *("64x256x128-g4-w8-s2-tma-p2", "64x256x128-g4-w8-s4-tma-p1-flat"),
)
"""For a gated GEMM1 with scales of blocks: whole groups, which it quantises itself."""
LONG = (
    *("16x64x256-g1-w4-s3", "16x32x256-g1-w4-s4", "16x64x256-g1-w4-s4-swap-fast", "16x64x256-g1-w4-s4-tma-swap-fast"),
    *("16x128x256-g1-w4-s3-tma-swap-fast", "32x64x256-g1-w4-s3-tma-swap-fast", "32x64x256-g1-w4-s3"),
)
"""For scales of tokens: nothing happens after 128 columns."""
LARGE = (
    *("128x256x128-g8-w8-s3-tma-p1-fast", "128x256x128-g8-w8-s4-tma-p1-fast", "128x256x128-g8-w8-s3-tma-p1-flat-fast"),
    *("128x256x128-g8-w8-s3-tma-p1-bulk-fast", "128x256x128-g8-w8-s3-tma-fast", "128x128x128-g8-w4-s3-tma-p2-fast"),
    *("128x128x128-g8-w8-s3-tma-p2-fast", "256x128x128-g4-w8-s3-tma-p1-fast", "64x256x128-g4-w4-s4-tma-p1-fast"),
    *("128x128x128-g8-w8-s3-fast", "64x128x128-g4-w4-s4-tma-p2-fast", "128x256x128-g8-w8-s3-fast"),
)
"""The tensor core keeps the sum."""
STRIPS = ((4, 1024, 4, 1), (8, 512, 4, 1), (8, 1024, 4, 1), (8, 512, 4, 3), (16, 512, 4, 1), (8, 1024, 8, 1), (4, 2048, 4, 1))


def tiles(scheme: str, product: str) -> list[Tile]:
    """For `first` or `second` of a scheme."""
    blocks, first = scheme == "fp8_block", product == "first"
    texts = [*EVERY, *(GROUPS if blocks and first else ()), *(() if blocks else LONG), *LARGE]
    found = [Tile.parse(text) for text in texts]
    if not first:
        found = [replace(tile, bulk=False) for tile in found]
        if blocks:
            found = [tile for tile in found if tile.block_n <= 128]  # one scale for the weights of a tile
    return list(dict.fromkeys(found))


def strips() -> list[Strip]:
    return [Strip(*sizes) for sizes in STRIPS]
