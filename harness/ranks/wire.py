"""Messages between a pool and its own ranks. By value: a rank may be dead before its message is read."""

from __future__ import annotations

import copyreg
import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch


def dumps(message: object) -> bytes:
    """Raises whatever the parts of the message raise: functions must be importable, arguments plain values or CPU tensors.

    torch teaches multiprocessing to send tensors as handles to memory that the sender must keep alive; here they are copied.
    """
    buffer = io.BytesIO()
    pickler = ForkingPickler(buffer)
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _parts}
    pickler.dump(message)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return ForkingPickler.loads(data)


def _parts(t: torch.Tensor) -> Any:
    """How to make a tensor anew. Codes of 8 bits go as bytes: torch writes dtypes that it cannot read back from a pickle."""
    if t.dtype.itemsize > 1 or not t.dtype.is_floating_point:
        return t.__reduce_ex__(2)
    plain = t.detach().clone(memory_format=torch.contiguous_format).view(torch.uint8)
    return _from_bytes, (plain, t.dtype)


def _from_bytes(plain: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return plain.view(dtype)
