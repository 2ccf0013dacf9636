"""Rank processes: how they start, how they end, and why none outlives its pool.

A rank is forked by a fork server that has only imported torch: start-up costs hundredths of a second, and neither threads
nor CUDA of the calling process are copied. Its life is tied to the pool's process by the kernel (the fork server ends
when the pool's process does, and the parent-death signal then kills its ranks) and by a thread of its own, which takes
along whatever the rank started itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Iterable
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any

PR_SET_PDEATHSIG = 1
PRELOAD = ["numpy", "torch", "torch.distributed", "torch.distributed._functional_collectives"]
"""Third-party modules only: our own come from wherever the pool's process has them."""


def fork_server() -> ForkServerContext:
    """The context that rank processes are made with. The server starts with the first of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def tie_to_pool() -> None:
    """In the rank: lead an own process group, and end when the pool's process ends, whatever this one is doing."""
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    server: Any = multiprocessing.forkserver._forkserver
    alive = getattr(server, "_forkserver_alive_fd", None)
    if alive is not None:
        # The server runs as long as somebody holds this pipe. A rank that hung would keep it, and so itself, alive.
        os.close(alive)
        server._forkserver_alive_fd = None
    threading.Thread(target=_follow_pool, name="follow the pool", daemon=True).start()


def _follow_pool() -> None:
    pool = multiprocessing.parent_process()
    assert pool is not None, "a rank is started by a pool"
    pool.join()
    os.killpg(0, signal.SIGKILL)


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill ranks and what they started. Returns when they are gone."""
    processes = list(processes)
    for process in processes:
        assert process.pid is not None, "started processes only"
        # The group exists once the rank has made it, and may outlive the rank.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    for process in processes:
        process.join(5.0)
        process.close()


def how_it_ended(exitcode: int | None) -> str:
    """An exit code in words."""
    if exitcode is None:
        return "still running"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"
