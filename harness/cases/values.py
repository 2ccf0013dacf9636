"""The table of value recipes: how x, w1 and w2 of each are drawn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.harness.cases import code_sweep, least, pinned, probes, recipes
from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
MakeX = Callable[[Problem, Stream], Tensor]
MakeW = Callable[[Problem, Stream, int, int, int], Tensor]
"""(problem, stream, rows, cols, expert): float64 (rows, cols). The shared expert's number is -1."""


def _alike(make: Callable[[Problem, Stream, int, int], Tensor]) -> MakeW:
    """A recipe that treats all experts alike."""
    return lambda p, s, rows, cols, expert: make(p, s, rows, cols)


_normal_w1, _normal_w2 = _alike(recipes.normal_w1), _alike(recipes.normal_w2)
_int_w = _alike(recipes.int_w)

RECIPES: dict[str, tuple[MakeX, MakeW, MakeW]] = {
    "normal": (recipes.normal_x, _normal_w1, _normal_w2),
    "hetero": (recipes.hetero_x, _alike(recipes.hetero_w1), _alike(recipes.hetero_w2)),
    "int": (recipes.int_x, _int_w, _int_w),
    "sat": (recipes.sat_x, _alike(recipes.sat_w1), _alike(recipes.sat_w2)),
    "tagged": (probes.tagged_x, probes.tagged_w1, probes.tagged_w2),
    "wide": (probes.wide_x, probes.wide_w, probes.wide_w),
    "cancel": (recipes.normal_x, _normal_w1, probes.cancel_w2),
    "asym": (probes.asym_x, probes.asym_w1, probes.asym_w2),
    "clamp": (recipes.normal_x, probes.clamp_w1, _normal_w2),
    "tail": (probes.tail_x, probes.tail_w1, probes.tail_w2),
    "groups": (recipes.groups_x, _alike(recipes.groups_w1), _alike(recipes.groups_w2)),
    "experts": (recipes.groups_x, recipes.experts_w1, recipes.experts_w2),
    "edges": (recipes.edges_x, _alike(recipes.edges_w1), _alike(recipes.edges_w2)),
    "ties": (recipes.ties_x, _normal_w1, _normal_w2),
    "codes": (code_sweep.codes_x, _normal_w1, _normal_w2),
    "pin": (pinned.pinned_x, _alike(pinned.pinned_w1), _alike(pinned.pinned_w2)),
    "least": (least.least_x, _alike(least.least_w1), _alike(least.least_w2)),
    "sweep": (probes.sweep_x, probes.sweep_w1, probes.sweep_w2),
}
WHOLE = ("int", "sat", "tagged", "wide", "pin", "least")
"""Biases are small integers."""
NO_BIAS = ("sat", "tagged", "pin", "least")
"""A bias on the gate would leave the saturated values."""
EXACT_WEIGHTS = ("int", "sat", "tagged", "sweep", "pin", "least")
"""Routing weights are powers of two."""


def stream_owner(values: str, expert: int) -> int:
    """Whose stream an expert's weights are drawn from: its own, or its pair's where the two must match."""
    return expert - expert % 2 if values == "cancel" else expert
