"""Python stacks of ranks that do not answer, by way of faulthandler: asked for by a signal, read from a file."""

from __future__ import annotations

import linecache
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

from moeproof.harness.ranks.runner import FRAMES, WRAPPERS

PATIENCE = 0.5
"""Seconds that ranks have to write their stacks."""


def kernel_state(pid: int) -> str:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    found = re.search(r"^State:\s+(.*)$", status, re.MULTILINE)
    return f"; the kernel calls it {found[1]}" if found else ""


def ask(ranks: Mapping[int, Path]) -> None:
    """Have each process (pid -> stack file) write its stack. It does so even where it holds the interpreter's lock for ever."""
    for pid in ranks:
        os.kill(pid, signal.SIGUSR1)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and not all(_whole(path) for path in ranks.values()):
        time.sleep(0.01)


def _whole(path: Path) -> bool:
    """faulthandler writes the thread that got the signal last; the main thread is the one that gets it."""
    text = path.read_text(errors="replace")
    return "Current thread" in text and text.endswith("\n") and "worker.py" in text.rsplit("Current thread", 1)[-1]


_FRAME = re.compile(r'File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


def read_stack(path: Path) -> tuple[str, ...]:
    """Frames of the function, innermost last, out of what faulthandler wrote of all threads."""
    text = path.read_text(errors="replace")
    for section in text.split("\n\n"):
        found = [m for line in section.split("\n") if (m := _FRAME.search(line)) and not m["file"].endswith(WRAPPERS)]
        at = next((i for i, m in enumerate(found) if m["file"].endswith("worker.py") and m["name"] in ("_run", "_serve")), None)
        if at is not None:
            own = [_frame(m) for m in reversed(found[:at])]
            return tuple(own[-FRAMES:]) or ("waiting for a case",)
    return ()


def _frame(m: re.Match[str]) -> str:
    source = linecache.getline(m["file"], int(m["line"])).strip()
    return f"{Path(m['file']).name}:{m['line']} in {m['name']}" + (f": {source}" if source else "")
