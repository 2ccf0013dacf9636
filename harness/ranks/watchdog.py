"""Waits for all ranks, never longer than the deadline, and says what became of each.

A run ends when every rank has replied; when one has died or raised and the rest had a moment to show the same; at the
deadline; or earlier, when nothing moves any more and the journals already show that the ranks call different collectives.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from moeproof.harness.ranks import wire
from moeproof.harness.ranks.compare import Mismatch, mismatches
from moeproof.harness.ranks.journal import Story, read_journal
from moeproof.harness.ranks.outcome import Ending, RankRun, RankState
from moeproof.harness.ranks.process import how_it_ended
from moeproof.harness.ranks.runner import Reply
from moeproof.harness.ranks.stacks import ask, kernel_state, read_stack
from moeproof.harness.ranks.worker import journal_file, output_file, stack_file

TICK = 0.1
SETTLE = 0.25
"""Seconds after the first death or exception in which the others may show theirs: a dead rank makes its peers raise, and
their replies can be here first."""
STILL = 0.5
"""Seconds without a reply or a journal line after which the journals are compared while ranks still run."""


@dataclass(frozen=True)
class Member:
    """A started rank, as its pool sees it."""

    rank: int
    process: BaseProcess
    pool: Connection
    """The pool's end of the pipe."""
    folder: Path
    pid: int

    @property
    def journal(self) -> Path:
        return journal_file(self.folder, self.rank)


@dataclass
class Watch:
    """What is known of the ranks so far."""

    members: Sequence[Member]
    replies: dict[int, Reply] = field(default_factory=dict)
    dead: list[int] = field(default_factory=list)
    """In the order in which it was seen."""
    early: bool = False
    """Ended before the deadline: nothing moved, and the case could not pass any more."""

    @property
    def running(self) -> list[Member]:
        return [m for m in self.members if m.rank not in self.replies and m.rank not in self.dead]

    @property
    def returned(self) -> list[bool]:
        return [m.rank in self.replies and not self.replies[m.rank].error for m in self.members]

    @property
    def trouble(self) -> bool:
        return bool(self.dead) or any(r.error for r in self.replies.values())

    def stories(self) -> list[Story]:
        return [read_journal(m.journal) for m in self.members]

    def mismatches(self, stories: Sequence[Story]) -> list[Mismatch]:
        return mismatches([s.entries for s in stories], self.returned)


def watch(members: Sequence[Member], deadline: float) -> Watch:
    """Wait for one reply of every rank, or for the reason why there will be none. `deadline` is of the monotonic clock."""
    seen = Watch(members)
    settle, moved, size = deadline, time.monotonic(), -1
    while running := seen.running:
        now = time.monotonic()
        if now >= settle:
            break
        if _listen(seen, running, min(TICK, settle - now)):
            moved = time.monotonic()
            if seen.trouble and settle == deadline:
                settle = min(deadline, moved + SETTLE)
        else:
            now = time.monotonic()
            written = sum(m.journal.stat().st_size for m in members if m.journal.exists())
            if written != size:
                moved, size = now, written
            elif now - moved > STILL and not seen.early:
                moved = now
                seen.early = bool(seen.mismatches(seen.stories()))
                settle = now if seen.early else settle
    return seen


def _listen(seen: Watch, running: Sequence[Member], timeout: float) -> bool:
    """Take in what the running ranks have to say; whether there was anything."""
    by_sign = {m.pool: m for m in running} | {m.process.sentinel: m for m in running}
    signs = connection.wait(list(by_sign), timeout)
    for member in {m.rank: m for m in map(by_sign.__getitem__, signs)}.values():  # type: ignore[arg-type]
        try:
            # A last word counts before the death that followed it.
            seen.replies[member.rank] = wire.loads(member.pool.recv_bytes())
        except (EOFError, OSError):
            seen.dead.append(member.rank)
    return bool(signs)


def conclude(seen: Watch, started: float, deadline: float, seeds: Sequence[int]) -> RankRun:
    """The run's ending, in words. `started` is of the monotonic clock, `deadline` in seconds."""
    seconds = time.monotonic() - started
    stories = seen.stories()
    differ = seen.mismatches(stories)
    raised = sorted((r.when, rank) for rank, r in seen.replies.items() if r.error)
    running = seen.running
    refused = False
    rank: int | None
    if seen.dead:
        ending, rank = Ending.DIED, seen.dead[0]
        how = _death(seen.members[rank])
        headline = f"rank {rank} died: {how}{_place(stories[rank])}"
        if differ and "SIGABRT" in how:
            # gloo aborts a process that receives more than it asked for: the cause is who called something else.
            rank = differ[0].rank
            headline += f"; before that the collectives of rank {rank} differ from those of rank {differ[0].other}"
    elif raised:
        ending, rank = Ending.RAISED, first_refusal(seen.replies, [r for _, r in raised])
        reply = seen.replies[rank]
        refused = reply.refused
        headline = f"rank {rank} {'refused its arguments' if refused else 'raised'}{_place(stories[rank])}: {reply.error}"
    elif running:
        ending, rank = Ending.HUNG, _suspect(running, stories, differ)
        when = f"no end within the deadline of {deadline:g} s"
        if seen.early:
            when = f"ended after {seconds:.1f} s of {deadline:g} s: nothing moves, and the ranks call different collectives"
        headline = when if rank is None else f"{when}; look at rank {rank}{_place(stories[rank])}"
    elif differ:
        ending, rank = Ending.MISMATCH, differ[0].rank
        headline = f"the collectives of rank {rank} are not those of rank {differ[0].other}"
    else:
        ending, rank, headline = Ending.DONE, None, ""
    if ending is Ending.DONE:
        results = tuple(wire.loads(seen.replies[m.rank].result) for m in seen.members)
        states: tuple[RankState, ...] = ()
    else:
        results = ()
        if ending is Ending.HUNG:
            ask({m.pid: stack_file(m.folder, m.rank) for m in running})
        states = tuple(_state(m, seen, stories[m.rank]) for m in seen.members)
    return RankRun(ending, states, results, rank, headline, tuple(differ), tuple(seeds), seconds, refused)


def in_step(seen: Watch, run: RankRun) -> bool:
    """Whether the ranks can take the next case: all replied, none inside a collective, all at the same place."""
    if seen.running or seen.dead or run.mismatches or any(r.broken for r in seen.replies.values()):
        return False
    stories = seen.stories()
    everyone = mismatches([s.entries for s in stories], [True] * len(stories))
    return not everyone and all(s.open is None for s in stories)


def first_refusal(replies: Mapping[int, Reply], raised: Sequence[int]) -> int:
    """The rank that raised first, unless it only repeats why another one refused: that is told to all before they go on."""
    words = replies[raised[0]].error
    return next((r for r in raised if re.search(rf"\brank {r} refused", words)), raised[0])


def _suspect(running: Sequence[Member], stories: Sequence[Story], differ: Sequence[Mismatch]) -> int | None:
    """The rank that the others wait for: it differs, or is busy elsewhere, or is behind."""
    if differ:
        return differ[0].rank
    elsewhere = [m.rank for m in running if stories[m.rank].open is None]
    if elsewhere and len(elsewhere) < len(running):
        return elsewhere[0]
    behind = min(running, key=lambda m: len(stories[m.rank].entries)).rank
    ahead = max(len(s.entries) for s in stories)
    return behind if len(running) == 1 or len(stories[behind].entries) < ahead else None


def _place(story: Story) -> str:
    where = f" in stage {story.stage}" if story.stage else ""
    if story.open is not None:
        return f"{where}, inside collective {story.open}"
    return where + (f", after collective {story.last}" if story.last else "")


def _death(member: Member) -> str:
    member.process.join(SETTLE)
    return how_it_ended(member.process.exitcode)


def _state(member: Member, seen: Watch, story: Story) -> RankState:
    reply = seen.replies.get(member.rank)
    stack: tuple[str, ...] = ()
    if reply is not None:
        state, stack = (f"raised {reply.error}", reply.stack) if reply.error else ("returned", ())
    elif member.rank in seen.dead:
        state, stack = how_it_ended(member.process.exitcode), read_stack(stack_file(member.folder, member.rank))
    else:
        state = "still running"
        if not seen.trouble:
            stack = read_stack(stack_file(member.folder, member.rank)) or (f"no Python stack{kernel_state(member.pid)}",)
    return RankState(member.rank, member.pid, state, story.stage, story.open or story.last, stack, _tail(member))


def _tail(member: Member, lines: int = 5) -> tuple[str, ...]:
    text = output_file(member.folder, member.rank).read_text(errors="replace")
    return tuple(text.strip().split("\n")[-lines:]) if text.strip() else ()
