"""A pool of rank processes that serves case after case."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeproof.harness.ranks import wire
from moeproof.harness.ranks.context import RankContext
from moeproof.harness.ranks.outcome import RankRun
from moeproof.harness.ranks.process import fork_server, guard, how_it_ended, kill
from moeproof.harness.ranks.transport import place
from moeproof.harness.ranks.watchdog import Member, conclude, in_step, watch
from moeproof.harness.ranks.worker import Spec, main, output_file, stack_file
from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.world import rank_seed

DEADLINE = 60.0
"""Seconds for one case on all ranks."""
START_DEADLINE = 180.0
"""Seconds for all ranks to import torch and join their group."""
CLOSE = 2.0


class RankPool:
    """`world_size` processes joined in one torch.distributed group, started at the first run and kept for the next.

    `run` never raises for what happens on a rank and always ends, at the latest about a second after the deadline. After
    a run that leaves the ranks out of step they are killed, with everything they started, and the next run gets new ones:
    0.15 s on a quiet CPU. Ranks also end when this process ends, even by kill -9.

    What a user must know:
    - A function and its arguments travel by value to other processes: the function must be importable there (a module's
      top level), arguments and results plain values or CPU tensors.
    - As always with multiprocessing, a script that makes a pool needs `if __name__ == "__main__":`.
    - Collectives through torch.distributed are recorded and compared; others only where announce() tells of them.
    - What a rank prints is kept for the diagnosis, not shown. Ranks have one torch thread and a fresh seed each case.
    """

    def __init__(self, world_size: int, transport: str = "gloo", *, deadline: float = DEADLINE, record: bool = True) -> None:
        check(world_size >= 1, f"world_size={world_size} must be at least 1")
        check(deadline > 0, f"deadline={deadline} must be above 0 seconds")
        self.world_size, self.transport, self.deadline, self.record = world_size, transport, deadline, record
        self.placements = [place(transport, world_size, rank) for rank in range(world_size)]
        self.starts = 0
        """How often ranks were started."""
        self._members: list[Member] = []
        self._stop: Callable[[], object] = lambda: None

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks; empty before the first run, and after one that broke the pool."""
        return [m.pid for m in self._members]

    def run(self, function: Callable[..., Any], *arguments: object, seed: int = 0, deadline: float | None = None) -> RankRun:
        """function(context, *arguments) on every rank; `seed` is the case's, `deadline` in seconds.

        Raises ContractError where function or arguments cannot travel.
        """
        limit = self.deadline if deadline is None else deadline
        try:
            message = wire.dumps((function, arguments, seed))
        except Exception as error:  # pickling runs the parts' own code
            raise ContractError(
                f"{getattr(function, '__qualname__', function)} and its arguments cannot be sent to ranks: {error}; "
                "the function must stand at the top level of an importable module, arguments be plain values or CPU tensors"
            ) from error
        seeds = [rank_seed(seed, rank) for rank in range(self.world_size)]
        try:
            note = self._bury()
            if not self._members and (failed := self._start(seeds)) is not None:
                return failed
            for member in self._members:
                # All ranks wait for a message: nobody is writing.
                os.truncate(member.journal, 0)
                os.truncate(output_file(member.folder, member.rank), 0)
            started = time.monotonic()
            for member in self._members:
                with contextlib.suppress(OSError):  # a rank that has just died shows below
                    member.pool.send_bytes(message)
            seen = watch(self._members, started + limit)
            run = conclude(seen, started, limit, seeds)
        except BaseException:  # interrupted: the ranks are in the middle of something
            self.kill()
            raise
        if not in_step(seen, run):
            self.kill()
        return replace(run, note=note) if note else run

    def _bury(self) -> str:
        """Ranks that died since the last case must not spoil the next one. What happened, in words."""
        # A rank says nothing unasked: what can be read between two cases is the end of its pipe.
        gone = [m for m in self._members if m.pool.poll() or not m.process.is_alive()]
        if not gone:
            return ""
        for m in gone:
            m.process.join(1.0)
        words = "; ".join(f"rank {m.rank} {how_it_ended(m.process.exitcode)} between two cases" for m in gone)
        self.kill()
        return f"{words}; new ranks were started"

    def warm_up(self) -> RankRun:
        """Start the ranks now and have each do nothing."""
        return self.run(_nothing)

    def _start(self, seeds: list[int]) -> RankRun | None:
        """Start the ranks; None, or how it failed."""
        folder = Path(tempfile.mkdtemp(prefix="moeproof-ranks-"))
        self.starts += 1
        server = fork_server()
        members = self._members
        processes: list[Any] = []
        # Also runs when this object is collected, and when the interpreter exits.
        self._stop = weakref.finalize(self, _discard, processes, folder)
        started = time.monotonic()
        for rank, placement in enumerate(self.placements):
            spec = Spec(rank, self.world_size, placement, folder, self.record)
            for file in (stack_file(folder, rank), output_file(folder, rank)):
                file.touch()
            ours, theirs = server.Pipe()
            process = server.Process(target=main, args=(spec, theirs), name=f"rank {rank}")
            process.start()
            theirs.close()
            processes.append(process)
            assert process.pid is not None, "just started"
            members.append(Member(rank, process, ours, folder, process.pid))
        watcher = server.Process(target=guard, args=([m.pid for m in members],), name="guard")
        watcher.start()
        processes.insert(0, watcher)  # ends first: the process ids that it holds must not have found new owners
        seen = watch(members, started + START_DEADLINE)
        if not seen.running and not seen.trouble:
            return None
        run = conclude(seen, started, START_DEADLINE, seeds)
        # The journal is made first of all: without it the rank fell over what Python runs before.
        never = [m for m in members if not m.journal.exists() and m.rank in seen.dead]
        hint = "; it ended while importing the main script: does that make the pool under `if __name__ == '__main__':`?"
        run = replace(run, started=False, headline=f"the ranks did not start: {run.headline}{hint if never else ''}")
        self.kill()
        return run

    def kill(self) -> None:
        """End the ranks at once. The next run starts new ones."""
        members, self._members = self._members, []
        self._stop()
        for member in members:
            member.pool.close()

    def close(self) -> None:
        """Let the ranks leave their group, and end those that do not."""
        for member in self._members:
            with contextlib.suppress(OSError):
                member.pool.send_bytes(b"")
        end = time.monotonic() + CLOSE
        for member in self._members:
            member.process.join(max(0.0, end - time.monotonic()))
        self.kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _discard(processes: list[Any], folder: Path) -> None:
    kill(processes)
    processes.clear()
    shutil.rmtree(folder, ignore_errors=True)


def _nothing(context: RankContext) -> None:
    pass
