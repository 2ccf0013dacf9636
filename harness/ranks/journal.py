"""The journal of a rank: its stages and collectives, written as they happen, readable when the rank no longer answers.

One file per rank, one JSON line per event. A line is handed to the kernel before the collective starts, so that neither
a hang nor kill -9 can lose it. The pool empties the files between cases.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """One collective as one rank called it. Sizes are this rank's own."""

    op: str
    group: str = ""
    """Name of the process group, the same on all its ranks."""
    ranks: tuple[int, ...] = ()
    """Global ranks of the group, in group order."""
    dtype: str = ""
    inputs: tuple[Shape, ...] = ()
    outputs: tuple[Shape, ...] = ()
    send: tuple[int, ...] | None = None
    """Rows for each member of the group, where the collective is an exchange."""
    receive: tuple[int, ...] | None = None
    row: int = 1
    """Elements of a row."""
    agree: str = ""
    """What else must be the same on all ranks: the reduction, the root."""
    peer: int | None = None
    """The other global rank of a send or receive."""
    stage: str = ""
    where: str = ""
    """file:line of the call."""
    index: int = 0
    """Position among all collectives of this rank in this case, from 0."""
    finished: bool = False
    """The call returned. A call with async_op=True returns at once, and one on a GPU when it is queued."""

    def __str__(self) -> str:
        parts = [f"#{self.index} {self.op}"]
        if self.dtype:
            parts.append(self.dtype)
        if self.inputs:
            parts.append(_shapes(self.inputs) + (f" -> {_shapes(self.outputs)}" if self.outputs else ""))
        if self.send is not None:
            parts.append(f"sends {list(self.send)}")
        if self.receive is not None:
            parts.append(f"expects {list(self.receive)}")
        parts += [p for p in (self.agree, f"with rank {self.peer}" if self.peer is not None else "") if p]
        if self.ranks:
            parts.append(f"among ranks {_numbers(self.ranks)}")
        if self.where:
            parts.append(f"at {self.where}")
        return " ".join(parts)


def _shapes(shapes: Sequence[Shape]) -> str:
    distinct = list(dict.fromkeys(shapes))
    if len(distinct) == 1 and len(shapes) > 1:
        return f"{len(shapes)} x {distinct[0]}"
    return " ".join(str(s) for s in shapes)


def _numbers(ranks: Sequence[int]) -> str:
    if len(ranks) > 2 and list(ranks) == list(range(ranks[0], ranks[0] + len(ranks))):
        return f"{ranks[0]}..{ranks[-1]}"
    return ",".join(map(str, ranks))


class Journal:
    """The writing side, in the rank."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.inside = False
        """A collective is under way: those that it is made of are not recorded again."""
        self.reset()

    def reset(self) -> None:
        """A new case begins. The pool has emptied the file."""
        self.stage = ""
        self._count = 0

    def enter(self, stage: str) -> None:
        self.stage = stage
        self._write({"stage": stage})

    def begin(self, entry: Entry) -> int:
        """Write the entry down; its index."""
        index = self._count
        self._count += 1
        self._write(asdict(replace(entry, index=index, stage=self.stage)))
        return index

    def end(self, index: int) -> None:
        self._write({"end": index})

    def _write(self, record: dict[str, object]) -> None:
        os.write(self._fd, json.dumps(record).encode() + b"\n")


@dataclass(frozen=True)
class Story:
    """What a journal says: the stage the rank is in, and its collectives in order."""

    stage: str = ""
    entries: tuple[Entry, ...] = ()

    @property
    def last(self) -> Entry | None:
        return self.entries[-1] if self.entries else None

    @property
    def open(self) -> Entry | None:
        """The collective that the rank is inside of, or was when it died or raised."""
        return next((e for e in self.entries if not e.finished), None)


def read_journal(path: Path) -> Story:
    """The reading side. A line that is not yet whole is left for the next reading."""
    stage = ""
    entries: list[Entry] = []
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Story()
    for line in text.split("\n")[:-1]:
        record = json.loads(line)
        if "op" in record:
            entries.append(Entry(**{k: _frozen(v) for k, v in record.items()}))
        elif "end" in record:
            at = record["end"]
            entries[at] = replace(entries[at], finished=True)
        else:
            stage = record["stage"]
    return Story(stage, tuple(entries))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


_journal: Journal | None = None
"""The journal of this process; None where it is no rank."""


def attach(journal: Journal | None) -> None:
    """Make it the journal of this process."""
    global _journal
    _journal = journal


def enter_stage(stage: str) -> None:
    """Say which stage begins. Does nothing outside a rank."""
    if _journal is not None:
        _journal.enter(str(stage))


@contextmanager
def announce(
    op: str, *tensors: torch.Tensor, send: Sequence[int] | None = None, receive: Sequence[int] | None = None, row: int = 1
) -> Iterator[None]:
    """Write down a collective that does not go through torch.distributed: a put kernel, a signal wait, another library.

    `send` and `receive` are rows for each rank, `row` the elements of one. Does nothing outside a rank.
    """
    if _journal is None:
        yield
        return
    import torch.distributed as dist

    world = tuple(range(dist.get_world_size())) if dist.is_initialized() else ()
    entry = Entry(
        op=op,
        group="announced",
        ranks=world,
        dtype=str(tensors[0].dtype).removeprefix("torch.") if tensors else "",
        inputs=tuple(tuple(t.shape) for t in tensors),
        send=None if send is None else tuple(send),
        receive=None if receive is None else tuple(receive),
        row=row,
    )
    index = _journal.begin(entry)
    yield
    _journal.end(index)
