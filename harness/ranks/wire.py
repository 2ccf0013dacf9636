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
    pickler.dispatch_table = {**copyreg.dispatch_table, torch.Tensor: _by_value}
    pickler.dump(message)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return ForkingPickler.loads(data)


def _by_value(t: torch.Tensor) -> Any:
    """Narrow floats go as bytes: torch (2.11) pickles what it cannot read again."""
    if not (t.dtype.is_floating_point and t.dtype.itemsize == 1):
        return t.__reduce_ex__(2)
    return _from_bytes, (t.contiguous().view(torch.uint8), t.dtype)


def _from_bytes(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return codes.view(dtype)
