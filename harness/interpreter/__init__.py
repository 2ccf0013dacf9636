"""Run Triton kernels without a GPU, with the device's roundings and with every memory access checked.

    os.environ["TRITON_INTERPRET"] = "1"              # before anything imports triton
    from moeproof.harness import interpreter
    interpreter.install()
    with interpreter.sanitized(shuffle_seed=7) as log:
        kernel[grid](...)                             # raises KernelFault at the first bad access
    log.launches[0].stores                            # how many lanes were checked

After `install` every launch in the process is checked; `sanitized` sets options and keeps a log. Programs run one
after the other, so a kernel whose programs wait for each other hangs. Not thread-safe: Triton's interpreter patches
the global `triton.language`. This file imports triton inside `install` only, since that import fixes the mode.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moeproof.harness.interpreter.memory import KernelFault, LaunchReport, Session, sessions

__all__ = ["KernelFault", "LaunchReport", "Session", "install", "register", "sanitized"]

TOO_LATE = (
    "moeproof's interpreter needs TRITON_INTERPRET=1 in the environment before triton is imported for the first time: "
    "triton decorates its own library functions on import. Set it in conftest.py or before starting Python."
)


def install() -> None:
    """Replace Triton's interpreter by the repaired and checking one, for this process; a second call does nothing."""
    if "triton" not in sys.modules and os.environ.get("TRITON_INTERPRET") not in ("1", "true", "on"):
        raise RuntimeError(TOO_LATE)
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    if not isinstance(tl.cdiv, InterpretedFunction):
        raise RuntimeError(TOO_LATE)
    from moeproof.harness.interpreter import builder as interpreter_builder

    interpreter_builder.install()


@contextmanager
def sanitized(shuffle_seed: int = 0, allow_double_writes: bool = False, tf32: bool = False) -> Iterator[Session]:
    """Options for the launches inside the block, and a log of them.

    shuffle_seed: order in which the programs of a grid run; 0 is the natural one.
    allow_double_writes: two programs may store the same bits to one element; different bits stay a fault.
    tf32: `tl.dot` on float32 drops the low 13 bits of its operands when the kernel asks for tf32, by name or by
    Triton's default. Without it such dots are computed in full float32.
    """
    session = Session(shuffle_seed, allow_double_writes, tf32, dict(sessions[-1].registered))
    sessions.append(session)
    try:
        yield session
    finally:
        sessions.pop()


def register(tensor: Any, name: str) -> None:
    """Allow access to a tensor that kernels reach through a pointer in memory, until the `sanitized` block ends."""
    if len(sessions) == 1:
        raise RuntimeError("interpreter.register holds for one `with interpreter.sanitized()` block: call it inside")
    sessions[-1].registered[name] = tensor
