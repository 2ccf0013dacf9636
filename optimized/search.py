"""What `moeproof tune` may try for the fused layer: where it starts, and one step away from a plan. All of it compiles for
sm_90 without spilling (ci/kernel_resources.py)."""

from __future__ import annotations

from dataclasses import replace

from moeproof.optimized.fused import point
from moeproof.optimized.plans import Plan
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip
from moeproof.reference.contract.problem import Problem

TILES = tuple(
    Tile.parse(text)
    for text in (
        # Bound by weight bytes: how much a program keeps in flight, and how many programs there are.
        *("16x32x128-g1-w4-s4", "16x32x256-g1-w4-s4", "16x64x64-g1-w4-s5", "16x64x128-g1-w4-s3", "16x64x128-g1-w4-s4"),
        *("16x64x128-g1-w4-s5", "16x64x256-g1-w4-s3", "16x128x64-g1-w4-s4", "16x128x128-g1-w4-s3", "16x128x128-g1-w8-s3"),
        *("16x32x256-g1-w4-s4-tma", "16x64x128-g1-w4-s4-tma", "16x64x256-g1-w4-s3-tma", "16x128x64-g1-w4-s5-tma"),
        *("16x128x128-g1-w4-s3-tma", "16x128x128-g1-w4-s4-tma"),
        *("32x64x128-g1-w4-s4", "32x128x64-g1-w4-s4", "32x128x128-g1-w4-s3", "32x128x128-g1-w8-s3"),
        *("32x64x128-g1-w4-s4-tma", "32x128x64-g1-w4-s5-tma", "32x128x128-g1-w4-s3-tma"),
        # The ridge.
        *("64x64x128-g1-w4-s3", "64x128x64-g4-w4-s4", "64x128x128-g4-w8-s3", "64x128x64-g4-w4-s4-tma"),
        *("64x128x128-g4-w4-s3-tma", "64x256x64-g4-w4-s3-tma", "64x128x64-g4-w4-s4-tma-p2", "64x128x64-g4-w4-s3-tma-p3"),
        *("64x256x64-g4-w4-s4-tma-p1", "64x256x64-g4-w8-s4-tma-p1", "64x256x64-g4-w4-s2-tma-p2"),
        *("64x256x32-g4-w4-s5-tma-p2", "64x256x32-g4-w4-s4-tma-p2-flat"),
        *("64x256x64-g4-w4-s4-tma-p1-flat", "64x128x64-g4-w4-s4-tma-p2-flat"),
        # Bound by the tensor cores: few large tiles, weights reused from L2.
        *(
            "128x128x64-g8-w8-s3",
            "128x128x64-g8-w4-s4-tma",
            "128x128x64-g8-w8-s3-tma-p2",
            "128x128x64-g8-w4-s3-tma-p2",
            "128x128x64-g8-w8-s4-tma-p1",
        ),
        # Copies and products in warps of their own.
        "128x256x64-g8-w4-s4-tma-p1-roles",
        *("128x256x64-g8-w8-s3-tma", "128x256x64-g8-w8-s3-tma-p1", "128x256x64-g8-w8-s4-tma-p1", "128x128x128-g8-w8-s3-tma-p1"),
        *("128x256x64-g8-w8-s3-tma-p1-flat", "128x128x64-g8-w4-s3-tma-p2-flat", "128x128x64-g8-w8-s4-tma-p1-flat"),
        *("128x256x64-g8-w8-s3-tma-p1-bulk", "128x256x64-g8-w8-s4-tma-p1-bulk", "128x128x64-g8-w4-s3-tma-p2-bulk"),
        *("128x256x64-g8-w8-s3-tma-p1-flat-bulk",),
        *("256x128x64-g4-w8-s3-tma-p1", "256x128x64-g4-w8-s4-tma-p1", "256x128x64-g4-w8-s3-tma-p1-flat"),
    )
)
STRIPS = tuple(
    Strip(rows, step, warps, stages)
    for rows, step, warps, stages in (
        *((4, 512, 4, 1), (8, 256, 4, 1), (8, 512, 4, 1), (16, 256, 4, 1), (8, 1024, 8, 1), (16, 512, 8, 1), (4, 1024, 4, 1)),
        *((4, 512, 2, 1), (8, 256, 2, 1), (8, 512, 4, 3), (8, 256, 4, 4), (16, 256, 4, 3)),
    )
)
STARTS = {
    16: ("16x64x128-g1-w4-s4",),
    32: ("32x64x128-g1-w4-s4",),
    64: ("64x128x64-g4-w4-s4", "64x128x64-g4-w4-s4-tma-p2"),
    128: ("128x128x64-g8-w8-s3", "128x256x64-g8-w8-s3-tma-p1"),
    256: ("256x128x64-g4-w8-s3-tma-p1",),
}
"""Ordinary tiles of each height: by pointers, and by descriptors where those are worth their set-up."""
GROUPS = (1, 2, 4, 8, 16, 32)
FEW = 4
"""Tokens up to which every slot may read its own weights."""


def starts(problem: Problem, local_experts: int) -> list[Plan]:
    """One plan for each kind that can be best: strips for few tokens, and each block height near the mean rows of an expert."""
    rows = point(problem, local_experts).rows_per_expert
    plans = [Plan(STRIPS[2], STRIPS[2])] if problem.T <= FEW else []
    for height, texts in STARTS.items():
        # Half-empty tiles cost little where weight bytes rule, short ones read the weights of a busy expert again.
        if (height == 16 or height <= 4 * rows) and (height >= 64 or rows <= 2.5 * height):
            plans += [Plan(Tile.parse(text), Tile.parse(text)) for text in texts]
    return plans


AXES = ("first", "second", "first group", "second group", "overlap")


def _short(plan: Plan) -> bool:
    """Whether a call is so short that the gaps between its launches count."""
    return isinstance(plan.first, Strip) or plan.first.block_m <= 32


def vary(plan: Plan, axis: str) -> list[Plan]:
    """Plans that differ from this one along one axis."""
    product, _, group = axis.partition(" ")
    now = getattr(plan, product)
    if axis == "overlap":
        changed: list[object] = [not now] if _short(plan) else []
    elif isinstance(now, Strip):
        changed = [] if group else list(STRIPS)
    elif group:
        changed = [replace(now, group_m=g) for g in GROUPS]
    else:
        # The group is an axis of its own, and GEMM2's rows are scattered: no bulk copy takes them.
        tiles = [t for t in TILES if t.block_m == now.block_m and not (t.bulk and product == "second")]
        changed = [replace(tile, group_m=now.group_m) for tile in tiles]
    return [replace(plan, **{product: new}) for new in changed if new != now]


def compiled(problem: Problem, local_experts: int) -> list[Plan]:
    """Plans that between them launch every kernel of the search. A tile's group is no constant of the kernel."""
    plans: list[Plan] = []
    # Two starts of one height have the same neighbours.
    kinds = {start.first.block_m if isinstance(start.first, Tile) else 0: start for start in starts(problem, local_experts)}
    for start in kinds.values():
        if isinstance(start.first, Strip):
            plans += [Plan(strip, strip, overlap) for strip in STRIPS for overlap in (False, True)]
        else:
            same = [t for t in TILES if t.block_m == start.first.block_m]
            plans += [Plan(tile, tile, overlap) for tile in same for overlap in (False, True)[: 1 + _short(start)]]
    return plans
