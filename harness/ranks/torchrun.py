"""Ranks that torchrun started, on one host or several: this process is one of them.

The same functions, journals and comparisons as in a pool, but nobody here can restart a rank. torchrun ends the others when
one dies. A run without an end is ended by every rank itself, at the deadline, with its own diagnosis on standard error. After
a run that left the ranks out of step the remaining ones are refused.
"""

from __future__ import annotations

import datetime
import faulthandler
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moeproof.harness.ranks import record, wire
from moeproof.harness.ranks.compare import mismatches
from moeproof.harness.ranks.journal import Journal, Story, attach, read_journal
from moeproof.harness.ranks.outcome import Ending, RankRun, RankState
from moeproof.harness.ranks.runner import Reply, frame_lines, run_function
from moeproof.harness.ranks.watchdog import first_refusal
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.world import rank_seed

GROUP_TIMEOUT = datetime.timedelta(hours=1)
BACKENDS = {"gloo": "gloo", "symm": "gloo", "nccl": "nccl"}
HUNG = 70
"""Exit code of a rank that ended itself at the deadline."""


def launched() -> bool:
    """Whether torchrun started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


class TorchrunWorld:
    """This process's place among the ranks that torchrun started. Every rank makes one, and all make the same runs in order."""

    def __init__(self, transport: str, deadline: float) -> None:
        check(transport in BACKENDS, f"transport {transport} needs no torchrun; under it use {', '.join(BACKENDS)}")
        self.rank, self.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.transport, self.deadline = transport, deadline
        self.starts, self.pids = 1, [os.getpid()]
        self.device = torch.device("cpu")
        if transport != "gloo":
            gpus, local = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
            shared = transport == "symm"
            check(gpus >= (1 if shared else local), f"transport {transport}: {local} ranks on this host, {gpus} GPUs")
            if local > gpus:
                os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % gpus)
            torch.cuda.set_device(self.device)
        torch.set_num_threads(1)
        dist.init_process_group(BACKENDS[transport], timeout=GROUP_TIMEOUT)
        # Results and journals travel apart from what is judged, and before recording starts.
        self._control = dist.new_group(backend="gloo", timeout=GROUP_TIMEOUT)
        self._path = Path(tempfile.mkdtemp(prefix="moeproof-ranks-"), f"rank{self.rank}.journal")
        self._journal = Journal(self._path)
        attach(self._journal)
        record.install(self._journal)
        self._broken = ""

    def run(self, function: Callable[..., Any], *arguments: object, seed: int = 0, deadline: float | None = None) -> RankRun:
        """function(context, *arguments) on every rank, as RankPool.run. Every rank gets the same RankRun."""
        seeds = [rank_seed(seed, rank) for rank in range(self.world_size)]
        if self._broken:
            return RankRun(
                Ending.RAISED, (), headline=f"not run: {self._broken}; torchrun starts no new ranks", seeds=tuple(seeds)
            )
        limit = self.deadline if deadline is None else deadline
        os.truncate(self._path, 0)
        self._journal.reset()
        started = time.monotonic()
        alarm = threading.Timer(limit, self._give_up, (limit, threading.get_ident()))
        alarm.daemon = True
        alarm.start()
        # For a rank that never gives the interpreter up: the timer's thread cannot run there.
        faulthandler.dump_traceback_later(limit + 1.0, exit=True)
        try:
            reply = run_function(self.rank, self.world_size, self.device, self.transport, function, arguments, seed)
            own = (os.getpid(), reply, read_journal(self._path))
            everyone: list[Any] = [None] * self.world_size
            self._journal.inside = True  # not a collective of the case
            dist.all_gather_object(everyone, own, group=self._control)
        finally:
            self._journal.inside = False
            alarm.cancel()
            faulthandler.cancel_dump_traceback_later()
        run = _concluded(everyone, seeds, time.monotonic() - started)
        stories = [story for _, _, story in everyone]
        apart = mismatches([s.entries for s in stories], [True] * self.world_size)
        if apart or any(s.open for s in stories) or any(r.broken for _, r, _ in everyone):
            self._broken = "an earlier case left the ranks out of step"
        return run

    def _give_up(self, limit: float, thread: int) -> None:
        """Say where this rank is, and end it. torchrun then ends the others."""
        story = read_journal(self._path)
        last = story.open or story.last
        stack = frame_lines(traceback.extract_stack(sys._current_frames()[thread]))
        state = RankState(self.rank, os.getpid(), "still running", story.stage, last, stack)
        sys.stderr.write(f"moeproof: TIMEOUT on {socket.gethostname()}: no end within the deadline of {limit:g} s\n  {state}\n")
        sys.stderr.flush()
        os._exit(HUNG)

    def close(self) -> None:
        attach(None)
        if not self._broken:
            dist.barrier(group=self._control)
        dist.destroy_process_group()
        shutil.rmtree(self._path.parent, ignore_errors=True)


def _concluded(everyone: Sequence[tuple[int, Reply, Story]], seeds: Sequence[int], seconds: float) -> RankRun:
    """The ending of a run in which every rank has replied."""
    replies = {rank: reply for rank, (_, reply, _) in enumerate(everyone)}
    differ = mismatches([story.entries for _, _, story in everyone], [not r.error for r in replies.values()])
    # No clock is shared between hosts: the lowest rank that raised stands for all.
    raised = [rank for rank, reply in replies.items() if reply.error]
    states = tuple(
        RankState(rank, pid, f"raised {r.error}" if r.error else "returned", s.stage, s.open or s.last, r.stack)
        for rank, (pid, r, s) in enumerate(everyone)
    )
    common: dict[str, Any] = {"mismatches": tuple(differ), "seeds": tuple(seeds), "seconds": seconds}
    if raised:
        rank = first_refusal(replies, raised)
        refused = replies[rank].refused
        headline = f"rank {rank} {'refused its arguments' if refused else 'raised'}: {replies[rank].error}"
        return RankRun(Ending.RAISED, states, rank=rank, headline=headline, refused=refused, **common)
    if differ:
        headline = f"the collectives of rank {differ[0].rank} are not those of rank {differ[0].other}"
        return RankRun(Ending.MISMATCH, states, rank=differ[0].rank, headline=headline, **common)
    return RankRun(Ending.DONE, (), tuple(wire.loads(r.result) for r in replies.values()), **common)
