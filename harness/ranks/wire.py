"""Messages between a pool and its own ranks. By value: a rank may be dead before its message is read."""

from __future__ import annotations

import copyreg
import io
from multiprocessing.reduction import ForkingPickler
from typing import Any


def dumps(message: object) -> bytes:
    """Raises whatever the parts of the message raise: functions must be importable, arguments plain values or CPU tensors.

    torch teaches multiprocessing to send tensors as handles to memory that the sender must keep alive; here they are copied.
    """
    buffer = io.BytesIO()
    pickler = ForkingPickler(buffer)
    pickler.dispatch_table = copyreg.dispatch_table
    pickler.dump(message)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    return ForkingPickler.loads(data)
