"""Tensor-parallel shards of I: which rows of w1 a shard holds, and where a quantised scheme can be cut."""

from __future__ import annotations

import math

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL

Tensor = torch.Tensor


def gate_up_rows(p: Problem, columns: slice, device: torch.device | str = "cpu") -> Tensor:
    """int64: rows of w1 that make the intermediate `columns`: gate and up of each, in the activation's packing."""
    wanted = torch.arange(columns.start, columns.stop, device=device)
    if not p.act.gated:
        return wanted
    if p.act.interleaved:
        return torch.stack([2 * wanted, 2 * wanted + 1], dim=1).flatten()
    return torch.cat([wanted, p.I + wanted])


def check_shards(p: Problem, grid: Grid) -> None:
    """Refuse shards that cut through a scale group or a packed byte: neither shard could then hold the scale as it stands.

    A scale that spans the whole of I is no hindrance: of a weight every shard keeps it, of h every shard has its own.
    """
    scheme = p.quant
    if grid.tp == 1 or scheme.w is None:
        return
    for shard in range(grid.tp):
        columns = grid.columns(p.I, shard)
        words = f"tp={grid.tp}: shard {shard} of I={p.I} would hold columns {columns.start}..{columns.stop - 1}"
        for operand, q in (("w2", scheme.w), ("h", scheme.a2)):
            if q is not None:
                unit = math.lcm(1 if q.group[1] == ALL else q.group[1], q.format.per_byte)
                inside = torch.arange(columns.start, columns.stop)
                check(
                    _whole(inside, unit, p.I),
                    f"{words}; scheme {p.scheme} groups {unit} columns of {operand}, which no shard may cut",
                )
        unit = math.lcm(1 if scheme.w.group[0] == ALL else scheme.w.group[0], 2 if scheme.w.zero_points else 1)
        check(
            _whole(gate_up_rows(p, columns), unit, p.N),
            f"{words}; scheme {p.scheme} groups {unit} rows of w1, which no shard may cut",
        )


def _whole(index: Tensor, unit: int, size: int) -> bool:
    """Whether rising `index` is made of whole groups of `unit` out of `size`, the last of which may be short."""
    for part in index.split(unit):
        first = int(part[0])
        whole = torch.arange(first, min(first + unit, size))
        if first % unit or not torch.equal(part, whole):
            return False
    return True
