"""How the fused layer runs a problem: a plan for each point of a table per architecture. Tables are data beside this file.

A plan is one line of text, `FIRST SECOND [overlap]`: a tile (sorted rows, tensor cores) or a strip (few tokens, no sort)
for each of the two products. `selectable` lists every plan that any problem can get, so that all of them can be verified.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from moeproof.optimized.tiles import Tile, interpreted
from moeproof.optimized.vector import Strip
from moeproof.reference.contract.errors import check

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Plan:
    """What runs, and how. `first` is GEMM1 with the activation, `second` GEMM2."""

    first: Tile | Strip
    second: Tile | Strip
    overlap: bool = False
    """Kernels are set up while the one before them runs (programmatic dependent launch; Hopper)."""

    def __post_init__(self) -> None:
        check(type(self.first) is type(self.second), f"plan '{self}': both products are tiles, or both are strips")
        if isinstance(self.first, Tile) and isinstance(self.second, Tile):
            check(self.first.block_m == self.second.block_m, f"plan '{self}': both products share one map of row blocks")

    def __str__(self) -> str:
        return f"{self.first} {self.second}" + (" overlap" if self.overlap else "")

    @classmethod
    def parse(cls, text: str) -> Plan:
        words = text.split()
        good = len(words) == 2 or (len(words) == 3 and words[2] == "overlap")
        check(good, f"'{text}' is no plan; plans are 'FIRST SECOND' or 'FIRST SECOND overlap'")
        first, second = (Strip.parse(w) if w.startswith("v") else Tile.parse(w) for w in words[:2])
        return cls(first, second, len(words) == 3)


@dataclass(frozen=True)
class Point:
    """What a plan is chosen by. e counts the experts whose weights are here."""

    dtype: str
    """Or the scheme, where weights are quantised."""
    e: int
    K: int
    H: int
    I: int  # noqa: E741  (the project's letter)
    T: int

    @property
    def model(self) -> str:
        """The point without its tokens: a row of the table."""
        return f"{self.dtype} e={self.e} K={self.K} H={self.H} I={self.I}"

    @property
    def scheme(self) -> str:
        """ "" where weights are of 16 bits."""
        return self.dtype if self.dtype in RULES else ""

    @property
    def rows_per_expert(self) -> float:
        return self.T * self.K / max(self.e, 1)


STRIPS = Plan(Strip(8, 512, 4, 1), Strip(8, 512, 4, 1))
INTERPRETED_STRIPS = Plan(Strip(64, 512), Strip(64, 512))
"""A program costs milliseconds whatever its size."""
DECODE = Plan(Tile(16, 64, 128, 1, 4, 4), Tile(16, 64, 128, 1, 4, 4))
RULE: tuple[tuple[float, Plan], ...] = (
    (12, DECODE),
    (24, Plan(Tile(32, 128, 64, 1, 4, 4), Tile(32, 128, 64, 1, 4, 4))),
    (96, Plan(Tile(64, 128, 64, 4, 4, 4), Tile(64, 128, 64, 4, 4, 4))),
    (160, Plan(Tile(128, 128, 64, 8, 8, 3), Tile(128, 128, 64, 8, 8, 3))),
    (float("inf"), Plan(Tile(128, 256, 64, 8, 8, 3, True, 1), Tile(128, 256, 64, 8, 8, 3, True, 1))),
)
"""Where no table helps: the first plan whose limit is not below the mean rows of an expert. Limits lie between the points at
which an H100's table changes height."""
FP8_DECODE = Plan(Tile(16, 64, 128, 1, 4, 4), Tile(16, 64, 128, 1, 4, 4))
FP8_RULE: tuple[tuple[float, Plan], ...] = (
    (12, FP8_DECODE),
    (24, Plan(Tile(32, 64, 128, 1, 4, 4), Tile(32, 64, 128, 1, 4, 4))),
    (96, Plan(Tile(64, 128, 128, 4, 4, 3), Tile(64, 128, 128, 4, 4, 3))),
    (160, Plan(Tile(128, 128, 128, 8, 8, 3), Tile(128, 128, 128, 8, 8, 3))),
    (float("inf"), Plan(Tile(128, 128, 128, 8, 8, 4, True, 1), Tile(128, 128, 128, 8, 8, 4, True, 1))),
)
"""The same for schemes fp8_token and fp8_block. A step is one group of scales; twice the registers for sums."""
PACKED_RULE: tuple[tuple[float, Plan], ...] = (
    (24, Plan(Tile(16, 64, 256, 1, 4, 3, swap=True), Tile(16, 64, 256, 1, 4, 3, swap=True))),
    (48, Plan(Tile(32, 64, 256, 1, 4, 3, swap=True), Tile(32, 64, 256, 1, 4, 3, swap=True))),
    (float("inf"), Plan(Tile(64, 128, 128, 1, 4, 4, swap=True), Tile(64, 128, 128, 1, 4, 4, swap=True))),
)
"""Four-bit weights and 16-bit rows."""
FAST = Tile(128, 256, 128, 8, 8, 3, True, 1, fast=True)
FAST_RULE = (*FP8_RULE[:-1], (float("inf"), Plan(FAST, Tile(128, 128, 128, 8, 8, 4, True, 1, fast=True))))
RULES = {
    "fp8_token": FP8_RULE,
    "fp8_block": FP8_RULE,
    "fp8_token-fast": FAST_RULE,
    "fp8_block-fast": FAST_RULE,
    "mxfp4_w4a16": PACKED_RULE,
}
FAR = 4.0
"""A tabulated number of tokens says nothing about this many times as many."""


def fallback(point: Point) -> Plan:
    """The plan of a point that the table does not know."""
    if point.T == 1 and point.scheme != "mxfp4_w4a16":
        return INTERPRETED_STRIPS if interpreted() else STRIPS
    return next(plan for limit, plan in RULES.get(point.scheme, RULE) if point.rows_per_expert <= limit)


@functools.cache
def table(architecture: str, scheme: str = "") -> dict[str, dict[int, Plan]]:
    """Model -> tokens -> plan, as `moeproof tune` wrote it; empty where this architecture was never tuned. A file for 16-bit
    weights, and one for each scheme."""
    path = FOLDER / (f"plans_{architecture}_{scheme}.json" if scheme else f"plans_{architecture}.json")
    if not path.is_file():
        return {}
    plans = json.loads(path.read_text(encoding="utf-8"))["plans"]
    return {model: {int(T): Plan.parse(text) for T, text in row.items()} for model, row in plans.items()}


def architecture(device: torch.device) -> str:
    """`sm90` and the like; the interpreter has none of its own and takes an H100's."""
    if device.type != "cuda":
        return "sm90"
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def choose(point: Point, device: torch.device) -> Plan:
    """The table's plan of the nearest tabulated number of tokens (by ratio), or the rule's where none is near."""
    rows = table(architecture(device), point.scheme)
    # fp16 and bf16 move the same bytes at the same rate.
    row = rows.get(point.model) or rows.get(point.model.replace("fp16", "bf16")) or {}
    ratios = {T: max(T, point.T) / max(min(T, point.T), 1) for T in row}
    near = min(ratios, key=ratios.__getitem__, default=0)
    return fit(row[near] if ratios.get(near, FAR) < FAR else fallback(point), device, RULES.get(point.scheme, RULE))


def fit(plan: Plan, device: torch.device, rule: tuple[tuple[float, Plan], ...] = RULE) -> Plan:
    """The plan as this device can run it: no dependent launches and no bulk copies where there is no Hopper or newer."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0):
        return plan
    first, second = plan.first, plan.second
    if device.type == "cuda" and isinstance(first, Tile) and isinstance(second, Tile) and (first.tma or second.tma):
        return next(p for _, p in rule if isinstance(p.first, Tile) and p.first.block_m == min(first.block_m, 128))
    return Plan(first, second, False)


def selectable(architecture: str, scheme: str = "") -> list[Plan]:
    """Every plan that some problem of this scheme ("" = 16-bit weights) can get on this architecture, without repeats."""
    return list(dict.fromkeys(_selectable(architecture, scheme)))


def _selectable(architecture: str, scheme: str) -> Iterator[Plan]:
    yield STRIPS
    yield from (plan for _, plan in RULES.get(scheme, RULE))
    for row in table(architecture, scheme).values():
        yield from row.values()
