"""Rank processes: how they start, how they end, and why none outlives its pool.

A rank is forked by a fork server that has only imported torch: start-up costs hundredths of a second, and neither threads
nor CUDA of the calling process are copied. Its life is tied to the pool's process twice. By the kernel: the fork server
ends when the pool's process does, and the parent-death signal then kills its ranks. And by a guard, a process that does
nothing but wait for that end, and then kills the process group of every rank: that takes along what a rank started itself.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Iterable, Sequence
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
    _leave_the_fork_server()


def guard(ranks: Sequence[int]) -> None:
    """The life of a guard: wait for the pool's process to end, then kill the process groups of its ranks."""
    os.setpgid(0, 0)
    _leave_the_fork_server()
    pool = multiprocessing.parent_process()
    assert pool is not None, "a guard is started by a pool"
    pool.join()
    for pid in ranks:
        _kill_group(pid)


def _leave_the_fork_server() -> None:
    """The server runs as long as somebody holds this pipe. A rank that hangs would keep it, and so itself, alive."""
    server: Any = multiprocessing.forkserver._forkserver
    alive = getattr(server, "_forkserver_alive_fd", None)
    if alive is not None:
        os.close(alive)
        server._forkserver_alive_fd = None


def _kill_group(pid: int) -> None:
    """The group exists once the rank has made it, and outlives the rank while something that it started lives."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill ranks and what they started. Returns when they are gone."""
    processes = list(processes)
    for process in processes:
        assert process.pid is not None, "started processes only"
        process.kill()
        _kill_group(process.pid)
    for process in processes:
        process.join(5.0)
        with contextlib.suppress(ValueError):  # a driver may take longer to give a dying process up; it is dead all the same
            process.close()


def how_it_ended(exitcode: int | None) -> str:
    """An exit code in words."""
    if exitcode is None:
        return "still running"
    if exitcode < 0:
        return f"killed by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"
