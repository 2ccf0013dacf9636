"""Tiles and strips that the fused fp8 layer may use: what ci/quant_probe.py times, and `moeproof tune` searches.

All of it compiles for sm_90 without spilling (ci/kernel_resources.py). Two sums take twice the registers of one, so the large
tiles exist only where the tensor core keeps the sum (`fast`).
"""

from __future__ import annotations

from dataclasses import replace

from moeproof.optimized import search
from moeproof.optimized.plans import Plan
from moeproof.optimized.tiles import Tile, interpreted
from moeproof.optimized.vector import Strip
from moeproof.reference.contract.problem import Problem

EVERY = (
    # Bound by weight bytes.
    *("16x64x128-g1-w4-s4", "16x64x128-g1-w4-s6", "16x128x128-g1-w4-s4", "16x64x128-g1-w4-s5-tma", "16x32x128-g1-w4-s6"),
    *("16x64x128-g1-w4-s6-swap", "16x128x128-g1-w4-s4-swap", "16x64x128-g1-w4-s6-tma-swap", "16x128x128-g1-w4-s5-tma-swap"),
    *("32x64x128-g1-w4-s4", "32x64x128-g1-w4-s5-swap", "32x64x128-g1-w4-s6-tma-swap", "32x128x128-g1-w4-s5-tma-swap"),
    # The ridge.
    *("64x128x128-g4-w4-s3", "64x128x128-g4-w4-s4-tma", "64x128x128-g4-w4-s3-tma-p2", "64x64x128-g1-w4-s4"),
    # Bound by the tensor cores.
    *("128x128x128-g8-w8-s3", "128x128x128-g8-w8-s4-tma", "128x128x128-g8-w8-s4-tma-p1", "128x128x128-g8-w8-s6-tma-p1"),
)
"""For every scheme and both products."""
GROUPS = (
    *("16x256x128-g1-w4-s3", "16x256x128-g1-w4-s4-tma-swap", "32x256x128-g1-w8-s4-tma-swap"),
    *("64x256x128-g4-w8-s3-tma", "64x256x128-g4-w8-s4-tma-p1", "64x256x128-g4-w8-s4-tma-p1-bulk", "64x256x128-g4-w8-s3"),
)
"""For a gated GEMM1 with scales of blocks: whole groups, which it quantises itself."""
LONG = (
    *("16x64x256-g1-w4-s3", "16x32x256-g1-w4-s4", "16x64x256-g1-w4-s4-tma-swap-fast", "16x64x256-g1-w4-s4-swap-fast"),
    *("32x64x256-g1-w4-s3-tma-swap-fast", "128x128x128-g8-w4-s3-tma-p2-fast", "64x256x128-g4-w4-s4-tma-p1-fast"),
)
"""For scales of tokens: nothing happens after 128 columns, and a sum has no scales beside it in registers."""
LARGE = (
    *("128x256x128-g8-w8-s3-tma-p1-fast", "128x256x128-g8-w8-s3-tma-p1-bulk-fast", "128x256x128-g8-w8-s3-tma-fast"),
    *("256x128x128-g4-w8-s3-tma-p1-fast", "128x128x128-g8-w8-s3-fast", "128x128x128-g8-w8-s4-tma-p1-fast"),
)
"""The tensor core keeps the sum."""
ROLES = ("128x256x128-g8-w4-s4-tma-p1-roles",)
"""One warp copies, two groups of warps multiply."""
PACKED = (
    *("16x64x256-g1-w4-s3-swap", "16x64x256-g1-w4-s4-swap", "16x64x128-g1-w4-s5-swap", "16x128x256-g1-w4-s3-swap"),
    *("16x128x128-g1-w8-s5-swap", "16x128x256-g1-w8-s3-swap", "16x64x256-g1-w2-s3", "16x64x256-g1-w4-s3"),
    *("32x64x256-g1-w4-s3-swap", "32x64x128-g1-w4-s5-swap", "32x128x256-g1-w8-s3-swap"),
    *("32x128x128-g1-w8-s5-swap", "32x128x128-g1-w4-s4-swap"),
    *("64x64x256-g1-w4-s3-swap", "64x128x128-g1-w4-s4-swap", "64x64x128-g1-w4-s4-swap", "64x128x128-g1-w8-s4-swap"),
    *("128x128x128-g4-w8-s3-swap", "128x64x128-g1-w4-s4-swap"),
    *("16x64x256-g1-w4-s3-swap-apart", "16x128x256-g1-w8-s3-swap-apart", "16x64x128-g1-w4-s5-swap-apart"),
    *("32x64x256-g1-w4-s3-swap-apart", "32x128x256-g1-w8-s3-swap-apart", "32x128x128-g1-w8-s5-swap-apart"),
    *("64x128x128-g1-w8-s4-swap-apart",),
)
"""Four-bit weights."""
STRIPS = (
    *((4, 1024, 2, 3), (8, 1024, 4, 1), (2, 1024, 2, 3), (8, 1024, 4, 3), (8, 256, 2, 4), (16, 512, 4, 1), (4, 2048, 4, 1)),
    *((4, 1024, 4, 1), (2, 1024, 2, 1), (8, 512, 4, 3)),
)


def tiles(scheme: str, product: str) -> list[Tile]:
    """For `first` or `second` of a scheme."""
    if scheme == "mxfp4_w4a16":
        return [Tile.parse(text) for text in PACKED]
    blocks, first = scheme == "fp8_block", product == "first"
    texts = [*EVERY, *(GROUPS if blocks and first else ()), *(() if blocks else LONG), *LARGE]
    found = [Tile.parse(text) for text in texts]
    found += [] if interpreted() else _roles(blocks)
    if not first:
        found = [replace(tile, bulk=False) for tile in found]
        if blocks:
            found = [tile for tile in found if tile.block_n <= 128 or tile.roles]  # one scale for the weights of a tile
    return list(dict.fromkeys(found))


def _roles(blocks: bool) -> list[Tile]:
    """Kernels with roles. With scales of blocks they scale every partial sum, and have no weaker one."""
    plain = [Tile.parse(text) for text in ROLES]
    return plain if blocks else [*plain, *(replace(tile, fast=True) for tile in plain)]


def strips() -> list[Strip]:
    return [Strip(*sizes) for sizes in STRIPS]


AXES = search.AXES
FEW = search.FEW
SHORT = 32
"""Rows of a block up to which a call is so short that the gaps between its launches count."""


def _allowed(problem_scheme: str, product: str, fast: bool) -> list[Tile]:
    return [tile for tile in tiles(problem_scheme, product) if fast or not tile.fast]


def starts(problem: Problem, local_experts: int, fast: bool = False) -> list[Plan]:
    """One plan for each kind that can be best: strips for few tokens, and each block height near the mean rows of an expert."""
    p = problem
    rows = p.T * p.slots / max(local_experts, 1)
    plans = [Plan(strips()[0], strips()[0], True)] if p.T <= FEW and p.scheme != "mxfp4_w4a16" else []
    for height in (16, 32, 64, 128):
        if (height == 16 or height <= 4 * rows) and (height >= 64 or rows <= 2.5 * height):
            pair = [[t for t in _allowed(p.scheme, product, fast) if t.block_m == height] for product in ("first", "second")]
            plans += [Plan(first[0], second[0]) for first, second in [pair] if first and second]
    return plans


def vary(plan: Plan, axis: str, fast: bool = False) -> list[Plan]:
    """Plans that differ from this one along one axis. A plan does not say its scheme: what does not fit is refused when run."""
    product, _, group = axis.partition(" ")
    now = getattr(plan, product)
    short = isinstance(plan.first, Strip) or plan.first.block_m <= SHORT
    if axis == "overlap":
        changed: list[object] = [not now] if short else []
    elif isinstance(now, Strip):
        changed = [] if group else list(strips())
    elif group:
        changed = [replace(now, group_m=g) for g in search.GROUPS]
    else:
        schemes = ("mxfp4_w4a16",) if str(replace(now, group_m=1)) in _PACKED else ("fp8_block", "fp8_token")
        found = dict.fromkeys(t for scheme in schemes for t in _allowed(scheme, product, fast))
        changed = [replace(t, group_m=now.group_m) for t in found if t.block_m == now.block_m]
    return [replace(plan, **{product: new}) for new in changed if new != now]


_PACKED = {str(replace(Tile.parse(text), group_m=1)) for text in PACKED}


def compiled(problem: Problem, local_experts: int, fast: bool = False) -> list[Plan]:
    """Plans that between them launch every kernel of the search. A tile's group is no constant of the kernel."""
    plans: list[Plan] = []
    for start in starts(problem, local_experts, fast):
        if isinstance(start.first, Strip):
            plans += [Plan(strip, strip, overlap) for strip in strips() for overlap in (False, True)]
            continue
        firsts, seconds = (
            [t for t in _allowed(problem.scheme, product, fast) if t.block_m == start.first.block_m]
            for product in ("first", "second")
        )
        for i in range(max(len(firsts), len(seconds))):
            pair = firsts[min(i, len(firsts) - 1)], seconds[min(i, len(seconds) - 1)]
            plans += [Plan(*pair, overlap) for overlap in (False, True)[: 1 + (start.first.block_m <= SHORT)]]
    return plans
