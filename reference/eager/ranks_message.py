"""Rows as sealed bytes: everything that belongs to a row travels in one piece, and the receiver can tell that it did.

Bytes carry any dtype, fp8 included, which collectives refuse. The seal is a weighted sum of the row's 64-bit words: a row
that never arrived (0xFF or 0 throughout), arrived in part, or with one field of another row, has the wrong one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

Tensor = torch.Tensor
SEAL = 8
"""Bytes of a seal, and of the words that it sums: rows are filled up with zeros to whole words."""
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio, odd: its multiples are far apart."""


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


def body_bytes(fields: Sequence[Field]) -> int:
    """Bytes of a row before its seal, whole words."""
    return -(-sum(f.bytes for f in fields) // SEAL) * SEAL


def pack(columns: Sequence[Tensor]) -> Tensor:
    """uint8 (n, body + SEAL) of columns (n, ..), any dtypes. Written once, into the message itself."""
    fields = fields_of(columns)
    n, body, first = columns[0].size(0), body_bytes(fields), 0
    message = torch.empty(n, body + SEAL, dtype=torch.uint8, device=columns[0].device)
    for column, field in zip(columns, fields, strict=True):
        message[:, first : first + field.bytes] = byte_rows(column)
        first += field.bytes
    message[:, first:body] = 0
    message[:, body:] = _seal(message[:, :body])
    return message


def unpack(message: Tensor, fields: Sequence[Field]) -> tuple[list[Tensor], Tensor]:
    """(columns (n, ..), bool (n,): the row is sealed, that is, exactly what some rank packed)."""
    body, seal = message[:, :-SEAL], message[:, -SEAL:]
    columns, first = [], 0
    for field in fields:
        part = body[:, first : first + field.bytes]
        typed = part.clone(memory_format=torch.contiguous_format).view(field.dtype)
        columns.append(typed.view(message.size(0), *field.shape))
        first += field.bytes
    return columns, (seal == _seal(body)).all(dim=1)


def byte_rows(column: Tensor) -> Tensor:
    """uint8 (n, bytes) of a column (n, ..), a view where it is contiguous. fp8 knows no index_put, fill or collective; its
    bytes do."""
    return column.contiguous().view(column.size(0), math.prod(column.shape[1:])).view(torch.uint8)


def _seal(body: Tensor) -> Tensor:
    """uint8 (n, SEAL): 1 + sum of m_i * word_i mod 2^64 with odd m_i, so that rows of zeros have a seal that is not zero.

    One wrong word always shows, since an odd m_i has an inverse. The products take as much memory as the rows.
    """
    words = body.view(torch.int64)
    total = 1 + (words * _multipliers(words.size(1), body.device)).sum(dim=1)
    return total.view(torch.uint8).view(-1, SEAL)


@lru_cache(maxsize=64)
def _multipliers(count: int, device: torch.device) -> Tensor:
    """int64 (count,): odd numbers, each as any 64 bits: the steps of splitmix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    numbers = []
    for i in range(1, count + 1):
        z = i * _GOLDEN % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ z >> 31 | 1)
    return torch.tensor([z - 2**64 if z >= 2**63 else z for z in numbers], dtype=torch.int64, device=device)
