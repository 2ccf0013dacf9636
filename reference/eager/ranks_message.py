"""Rows as sealed bytes: everything that belongs to a row travels in one piece, and the receiver can tell that it did.

Bytes carry any dtype, fp8 included, which collectives refuse. The seal is a position-weighted sum of the row's bytes: a row
that never arrived (0xFF or 0 throughout), arrived in part, or with one field of another row, has the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
SEAL = 8
_PRIME = 2**31 - 1


@dataclass(frozen=True)
class Field:
    """One field of a row: its shape without the leading rows, and its dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def fields_of(columns: Sequence[Tensor]) -> list[Field]:
    return [Field(tuple(column.shape[1:]), column.dtype) for column in columns]


def pack(columns: Sequence[Tensor]) -> Tensor:
    """uint8 (n, bytes + SEAL) of columns (n, ..), any dtypes."""
    body = torch.cat([byte_rows(column) for column in columns], dim=1)
    return torch.cat([body, _seal(body)], dim=1)


def unpack(message: Tensor, fields: Sequence[Field]) -> tuple[list[Tensor], Tensor]:
    """(columns (n, ..), bool (n,): the row is sealed, that is, exactly what some rank packed)."""
    body, seal = message[:, :-SEAL], message[:, -SEAL:]
    columns = []
    for part, field in zip(body.split([f.bytes for f in fields], dim=1), fields, strict=True):
        typed = part.clone(memory_format=torch.contiguous_format).view(field.dtype)
        columns.append(typed.view(message.size(0), *field.shape))
    return columns, (seal == _seal(body)).all(dim=1)


def byte_rows(column: Tensor) -> Tensor:
    """uint8 (n, bytes): a copy of a column (n, ..). fp8 knows no index_put, no fill and no collective; its bytes do."""
    flat = column.clone(memory_format=torch.contiguous_format).view(column.size(0), math.prod(column.shape[1:]))
    return flat.view(torch.uint8)


def _seal(body: Tensor) -> Tensor:
    """uint8 (n, SEAL): 1 + sum of (i + 1) * byte_i mod a prime, so that rows of zeros have a seal that is not zero."""
    places = torch.arange(1, body.size(1) + 1, device=body.device)
    total = 1 + (body.long() * places).sum(dim=1, keepdim=True) % _PRIME
    return total.view(torch.uint8)
