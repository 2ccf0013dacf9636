"""Jobs side by side in processes that outlive a crash: a limit for each job, a limit for all, an answer for every one.

A process comes from a fork server that has torch loaded, and is replaced where it died, passed its limit or lost its CUDA
context; so one bad kernel costs one answer and no other.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

import torch

PRELOAD = ["torch", "moeproof.harness.judging.judge", "moeproof.optimized.cuda.candidates"]
Row = dict[str, object]
Job = Callable[[], Row]
"""Picklable: a function of a module, or a functools.partial of one."""


def lost(why: str) -> Row:
    """The answer of a job that has none."""
    return {"lost": why}


NOT_BEGUN, CUT_SHORT = lost("not begun: the time was up"), lost("ended: the time was up")


def left(row: Row) -> bool:
    """Is nothing known of this job but that the time for all was up?"""
    return row in (NOT_BEGUN, CUT_SHORT)


def run(
    jobs: Sequence[Job],
    workers: int,
    each: float,
    until: float,
    fresh: bool = False,
    seen: Callable[[Row], None] = lambda row: None,
) -> list[Row]:
    """The answer of every job, in order; `seen` gets each when it comes.

    `each`: seconds for one job. `until`: the time (of time.monotonic) at which jobs that still run are ended and no other
    begins. `fresh`: a process for every job.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(jobs)):
        waiting.put(index)
    answers = [dict(NOT_BEGUN) for _ in jobs]

    def work() -> None:
        process = _Process()
        try:
            while time.monotonic() < until:
                try:
                    index = waiting.get_nowait()
                except queue.Empty:
                    return
                answers[index] = process.ask(jobs[index], each, until)
                seen(answers[index])
                if fresh:
                    process.end()
        finally:
            process.end()

    threads = [threading.Thread(target=work) for _ in range(min(workers, len(jobs)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


_STARTING = threading.Lock()


class _Process:
    """Started when it is first asked, and again after it was lost."""

    def __init__(self) -> None:
        self._process: ForkServerProcess | None = None
        self._pipe: Connection | None = None

    def ask(self, job: Job, each: float, until: float) -> Row:
        pipe = self._pipe or self._start()
        seconds = max(0.0, min(each, until - time.monotonic()))
        try:
            pipe.send(job)
            if pipe.poll(seconds):
                row, sound = pipe.recv()
                if not sound:
                    self.end()
                return row
            if seconds < each:
                self.end()
                return dict(CUT_SHORT)
            why = f"no answer within {seconds:.0f} s"
        except (EOFError, OSError):
            why = "its process died"
        self.end()
        return lost(why)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other,), daemon=True)
        with _STARTING:
            self._process.start()
        other.close()
        return self._pipe


def _serve(pipe: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        while True:
            job = pipe.recv()
            try:
                row = job()
            except Exception as error:
                row = lost(f"{type(error).__name__}: {error}"[:1500])
            pipe.send((row, _sound()))
    os._exit(0)


def _sound() -> bool:
    """Whether this process can still use its GPU: after an illegal access it cannot, ever."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
