"""Ranks that meet in collectives, as threads of a child process under a deadline: a hang is named, never waited out.

A rank does nothing here but enter its collectives in order. One that not all ranks enter, under the same name, never
ends, as in a real communicator.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

from moeproof.harness.faults.fault import Edit, plant
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.stages import Stage

CHUNK = 8
"""Tokens of one dispatch."""
STEPS = 3
"""Calls a rank makes per case: some faults deadlock late."""
IDLE_S = 2.0
"""A collective nobody enters or leaves for this long is stuck. Healthy ones take well under a millisecond."""
STAGE = {"dispatch": Stage.DISPATCH, "gather": Stage.DISPATCH, "combine": Stage.COMBINE}


def rounds_of(tokens: int) -> int:
    """Dispatches that this many tokens need; one at least."""
    return max(-(-tokens // CHUNK), 1)


class RankProgram:
    """Which collectives a rank enters in one call."""

    def collectives(self, sizes: Sequence[int], rank: int, step: int) -> list[str]:
        """All ranks decide by the same numbers: the longest rank's."""
        name = self.algorithm(sizes, rank)
        rounds = self.rounds(sizes, rank)
        return [f"{name} {i}" for i in range(rounds)] + ["combine"]

    def algorithm(self, sizes: Sequence[int], rank: int) -> str:
        return "dispatch" if max(sizes) > CHUNK else "gather"

    def rounds(self, sizes: Sequence[int], rank: int) -> int:
        return rounds_of(max(sizes))


@dataclass(frozen=True)
class Stuck:
    """What the watchdog saw: the case it happened in, and the finding that names ranks and collective."""

    index: int
    finding: Finding


def _meet(sizes: Sequence[int], program: RankProgram, report: Connection) -> None:
    """All ranks through all steps. Blocks for ever where their collectives differ."""
    lock, world = threading.Lock(), len(sizes)
    arrived: dict[tuple[int, str], int] = {}
    complete = threading.Condition(lock)

    def rank_main(rank: int) -> None:
        index = 0
        for step in range(STEPS):
            for name in program.collectives(sizes, rank, step):
                with complete:
                    report.send(("enter", rank, index, name))
                    arrived[index, name] = arrived.get((index, name), 0) + 1
                    complete.notify_all()
                    while arrived[index, name] < world:
                        complete.wait()
                index += 1
        with lock:
            report.send(("leave", rank, index, ""))

    threads = [threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _child(report: Connection, edit: Edit, armed: bool, worlds: Sequence[Sequence[int]]) -> None:
    program = RankProgram()
    witness = plant(program, edit, armed)
    for index, sizes in enumerate(worlds):
        report.send(("case", index, witness.fired, ""))
        _meet(sizes, program, report)
    report.send(("done", len(worlds), witness.fired, ""))


def watch(edits: str, variant: str, armed: bool, worlds: Sequence[Sequence[int]]) -> tuple[int, Stuck | None]:
    """(times the faulty branch fired, the first hang). `edits` is the id of the fault: edits do not travel, names do."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moeproof.harness.faults.catalogue"])
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_child_by_name, args=(send, edits, variant, armed, list(worlds)), daemon=True)
    child.start()
    send.close()
    try:
        return _follow(receive, len(worlds[0]) if worlds else 0)
    finally:
        child.kill()
        child.join()


def _child_by_name(report: Connection, fault: str, variant: str, armed: bool, worlds: Sequence[Sequence[int]]) -> None:
    from moeproof.harness.faults.catalogue import by_id

    _child(report, by_id(fault).variants[variant], armed, worlds)


def _follow(receive: Connection, world: int) -> tuple[int, Stuck | None]:
    case, fired = -1, 0
    at: dict[int, tuple[int, str]] = {}
    for kind, a, b, name in _events(receive):
        if kind == "done":
            return int(b), None
        if kind == "case":
            case, fired, at = a, int(b), {}
        else:
            at[a] = (b, name if kind == "enter" else "")
    return max(fired, 1), Stuck(case, name_the_stuck(at, world))


def _events(receive: Connection) -> Iterator[tuple[str, int, int, str]]:
    """Until nothing comes for IDLE_S; the first one may take as long as a child takes to start."""
    patience = 60.0
    while receive.poll(patience):
        try:
            yield receive.recv()
        except EOFError:
            return
        patience = IDLE_S


def name_the_stuck(at: dict[int, tuple[int, str]], world: int) -> Finding:
    """Who waits in which collective, and who is elsewhere: the rank of the finding is the first that is elsewhere.

    `at` holds each rank's last (collective index, name); an empty name means that it went home.
    """
    waiting = [rank for rank in range(world) if rank in at and at[rank][1]]
    index, name = min((at[rank] for rank in waiting), default=(0, "nothing"))
    majority = max({at[r] for r in waiting}, key=lambda place: sum(at[r] == place for r in waiting), default=(index, name))
    index, name = majority
    there = [rank for rank in waiting if at[rank] == majority]
    absent = [rank for rank in range(world) if rank not in there]
    others = ", ".join(
        f"rank {rank} " + (f"is in collective {at[rank][0]} ({at[rank][1]})" if rank in waiting else "has left")
        for rank in absent
    )
    words = f"ranks {there} wait in collective {index} ({name}); {others}"
    stage = STAGE.get(name.split(" ")[0], Stage.DISPATCH)
    return Finding(stage, "collective", words, rank=absent[0] if absent else None)
