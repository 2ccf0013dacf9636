"""Judging in a child process with a deadline: for candidates that crash, hang or run into the interpreter's limits.

The child comes from a fork server that has torch loaded (0.03 s instead of 2 s a start) and stays for many cases; one that
dies or passes its deadline is replaced. The server itself never touches CUDA: each child makes its own context.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.judging.judge import judge, judge_lean
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome, Verdict

PRELOAD = ["torch", "moeproof.harness.judging.judge"]
WARM = parse_case("T=1,H=1,I=1,E=1,K=1,routing=none")
START_SECONDS = 60.0
"""Loading a candidate's module, on a busy machine."""


class Child:
    """A process that judges one candidate, by name, on the cases it is sent."""

    def __init__(self, name: str, mode: str, deadline: float) -> None:
        """`mode` is `interpret` or `device`, as modes.choose settled it; `deadline` are the seconds for one case."""
        self.name, self.mode, self.deadline = name, mode, deadline
        self._process: ForkServerProcess | None = None
        self._pipe: Connection | None = None

    def judge(self, case: Case, lean: bool = False) -> Verdict:
        """The verdict of the child; ERROR naming the signal where it died, TIMEOUT where it did not answer in time."""
        pipe = self._pipe or self._start()
        start = time.perf_counter()
        try:
            pipe.send((case, lean))
            if pipe.poll(self.deadline):
                answer: Verdict = pipe.recv()
                return answer
            outcome, reason = Outcome.TIMEOUT, f"no answer within {self.deadline:g} s"
        except (EOFError, OSError):
            outcome, reason = Outcome.ERROR, f"the candidate {self._death()}"
        self.close()
        return Verdict(outcome, self.name, case, reason=reason, seconds=time.perf_counter() - start)

    def close(self) -> None:
        """End the process, however busy it is."""
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
        self._process = context.Process(target=_serve, args=(other, self.name, self.mode), daemon=True)
        with _path_for_the_server():
            self._process.start()
        other.close()
        # Its first word is that it has loaded the candidate; the deadline is for judging.
        if self._pipe.poll(START_SECONDS):
            with contextlib.suppress(EOFError):  # died while loading: the first question will say so
                self._pipe.recv()
        return self._pipe

    def _death(self) -> str:
        assert self._process is not None
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            return f"ended its process by {signal.Signals(-code).name}"
        return f"ended its process with exit code {code}"


@contextlib.contextmanager
def _path_for_the_server() -> Iterator[None]:
    """The server, which the first child starts, imports what this process would: it learns sys.path by the environment."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(pipe: Connection, name: str, mode: str) -> None:
    """The child's life: load the candidate, then answer cases until the pipe closes."""
    import torch

    torch.set_num_threads(1)
    modes.choose(mode)
    (candidate,) = load_candidates([name])
    judge(lambda x, *rest: torch.zeros_like(x), WARM)  # what is imported on first use is no part of a case's time
    pipe.send("ready")
    while True:
        try:
            case, lean = pipe.recv()
        except EOFError:
            return
        pipe.send(judge_lean(candidate, case) if lean else judge(candidate, case))
