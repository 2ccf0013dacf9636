"""What lies where in a rank's arena: fields one after the other, with a gap between them that nobody writes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from moeproof.reference.contract.grid import Grid

Tensor = torch.Tensor
ALIGNMENT = 256
GAP = 256
NOTICE = 128
"""int32 words of a notice: code, three numbers, and text."""
TEXT = 4
"""Words before the text."""


@dataclass(frozen=True)
class Payload:
    """A row as it travels, and its scales where it is quantised. `hidden` counts the columns of what comes back."""

    hidden: int
    slots: int
    dtype: torch.dtype
    columns: int
    scale_dtype: torch.dtype = torch.float32
    scale_columns: int = 0
    """0: rows without scales."""
    returned: torch.dtype = torch.bfloat16
    """Of what the experts return."""

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def scale_bytes(self) -> int:
        return self.scale_columns * self.scale_dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """Every rank's arena looks the same: R sources have a region of `most` rows each, whether they fill it or not."""

    grid: Grid
    payload: Payload
    most: int
    """Rows of a region: the most tokens that a rank may have, at least 1."""

    @property
    def rows(self) -> int:
        return self.grid.ranks * self.most

    def region(self, source: int) -> slice:
        """The rows that come from this rank."""
        return slice(source * self.most, (source + 1) * self.most)

    @cached_property
    def local(self) -> int:
        """Experts of the rank that holds the most."""
        return max(len(self.grid.local(rank)) for rank in range(self.grid.ranks))

    @cached_property
    def fields(self) -> dict[str, tuple[int, tuple[int, ...], torch.dtype]]:
        """Name -> (byte offset, shape, dtype)."""
        R, p = self.grid.ranks, self.payload
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "signals": ((2, R), torch.int32),
            "notices": ((R, NOTICE), torch.int32),
            "tokens": ((R,), torch.int32),
            "counts": ((R, self.local), torch.int32),
            "ids": ((self.rows, p.slots), torch.int32),
            "weights": ((self.rows, p.slots), torch.float32),
            "scales": ((self.rows, p.scale_columns), p.scale_dtype),
            "rows": ((self.rows, p.columns), p.dtype),
            "parts": ((R, self.most, p.hidden), torch.float32),
        }
        at, fields = GAP, {}
        for name, (shape, dtype) in shapes.items():
            fields[name] = at, shape, dtype
            at += torch.Size(shape).numel() * dtype.itemsize + GAP
            at += -at % ALIGNMENT
        fields["end"] = at, (0,), torch.uint8
        return fields

    @property
    def nbytes(self) -> int:
        return self.fields["end"][0]

    def offset(self, name: str) -> int:
        return self.fields[name][0]

    def view(self, arena: Tensor, name: str) -> Tensor:
        """A field of an arena, uint8 (nbytes,), without a copy."""
        start, shape, dtype = self.fields[name]
        return arena[start : start + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)

    def gaps(self, arena: Tensor) -> Tensor:
        """uint8: every byte that belongs to no field. Cleared at the start, and never written."""
        inside = torch.zeros(arena.numel(), dtype=torch.bool, device=arena.device)
        for start, shape, dtype in self.fields.values():
            inside[start : start + torch.Size(shape).numel() * dtype.itemsize] = True
        return arena[~inside]
