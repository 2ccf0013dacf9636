"""Compares the collectives of all ranks: who skips one, reorders two or sends other sizes shows, even where nothing hangs.

Works on unfinished runs as well: what a running rank has not called yet proves nothing, what it has called does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moeproof.harness.ranks.journal import Entry

POINT_TO_POINT = ("send", "recv", "isend", "irecv")
_SAME_SIZES = (
    "all_reduce",
    "all_reduce_coalesced",
    "all_gather_into_tensor",
    "all_gather_single",
    "all_gather_tensor",
    "reduce_scatter",
    "reduce_scatter_single",
    "reduce_scatter_tensor",
)
"""All inputs have the same shapes on all ranks."""
_SAME_FIRST = ("broadcast", "reduce", "gather", "scatter")
"""The first tensor has; the list beside it exists on the root only."""


@dataclass(frozen=True)
class Mismatch:
    """Two ranks that do not call the same collective at the same place of their group's sequence."""

    rank: int
    """The rank that differs from the majority, or from the lowest rank where there is none."""
    index: int
    """Position in the sequence of the group, from 0."""
    entry: Entry | None
    """What `rank` calls there; None where it calls nothing more."""
    other: int
    other_entry: Entry | None
    what: str

    def __str__(self) -> str:
        return (
            f"collective {self.index} of the group: {self.what}; "
            f"rank {self.rank}: {self.entry or 'nothing more'}; rank {self.other}: {self.other_entry or 'nothing more'}"
        )


def mismatches(traces: Sequence[Sequence[Entry]], done: Sequence[bool]) -> list[Mismatch]:
    """The first mismatch of each process group.

    `traces[r]` are the collectives of rank r so far; `done[r]` says that there will be no more.
    """
    found: list[Mismatch] = []
    members = {e.group: e.ranks for trace in traces for e in trace}
    for group, ranks in members.items():
        own = {r: [e for e in traces[r] if e.group == group and e.op not in POINT_TO_POINT] for r in ranks}
        found += _first(own, done)
    return found + list(_pairs(traces, done))


def _first(own: dict[int, list[Entry]], done: Sequence[bool]) -> list[Mismatch]:
    """`own` has each member's sequence, in group order."""
    ranks = list(own)
    for index in range(max(len(s) for s in own.values())):
        here = {r: own[r][index] for r in ranks if index < len(own[r])}
        common = Counter(_signature(e) for e in here.values()).most_common(1)[0][0]
        reference = next(r for r, e in here.items() if _signature(e) == common)
        for r in ranks:
            entry = here.get(r)
            if entry is None:
                if done[r]:
                    return [Mismatch(r, index, None, reference, here[reference], f"rank {r} calls one fewer")]
            elif _signature(entry) != common:
                return [Mismatch(r, index, entry, reference, here[reference], _difference(entry, here[reference]))]
        for at, sender in enumerate(ranks):
            for to, receiver in enumerate(ranks):
                if sender in here and receiver in here and (what := _short(here, sender, at, receiver, to)):
                    return [Mismatch(sender, index, here[sender], receiver, here[receiver], what)]
    return []


def _signature(e: Entry) -> tuple[object, ...]:
    """What must be the same on all ranks."""
    op = e.op.removeprefix("functional.").removesuffix("_autograd")
    sizes: object = None
    if op in _SAME_SIZES:
        sizes = e.inputs, e.outputs if op != "reduce_scatter" else ()
    elif op in _SAME_FIRST:
        sizes = e.inputs[:1]
    return e.op, e.dtype, e.agree, sizes


def _difference(a: Entry, b: Entry) -> str:
    if a.op != b.op:
        return f"another operation, {a.op} against {b.op}"
    if a.dtype != b.dtype:
        return f"another dtype, {a.dtype} against {b.dtype}"
    if a.agree != b.agree:
        return f"'{a.agree}' against '{b.agree}'"
    return "other sizes"


def _short(here: dict[int, Entry], sender: int, at: int, receiver: int, to: int) -> str | None:
    """What is wrong between one sender and one receiver of an exchange."""
    a, b = here[sender], here[receiver]
    if a.send is None or b.receive is None:
        return None
    for e, r, counts in ((a, sender, a.send), (b, receiver, b.receive)):
        if len(counts) != len(here):
            return f"rank {r} gives {len(counts)} splits for {len(e.ranks)} ranks" if len(counts) != len(e.ranks) else None
    sent, expected = a.send[to], b.receive[at]
    if sent * a.row == expected * b.row:
        return None
    unit = "rows" if a.row == b.row != 1 else "elements"
    if unit == "elements":
        sent, expected = sent * a.row, expected * b.row
    return f"rank {sender} sends {sent} {unit} to rank {receiver}, which expects {expected}"


def _pairs(traces: Sequence[Sequence[Entry]], done: Sequence[bool]) -> Iterator[Mismatch]:
    """Sends and receives, matched in order per (group, sender, receiver)."""
    sends: dict[tuple[str, int, int], list[Entry]] = {}
    receives: dict[tuple[str, int, int], list[Entry]] = {}
    any_source = {r for r, trace in enumerate(traces) for e in trace if e.op in ("recv", "irecv") and e.peer is None}
    for rank, trace in enumerate(traces):
        for e in trace:
            if e.op in ("send", "isend") and e.peer is not None and e.peer not in any_source:
                sends.setdefault((e.group, rank, e.peer), []).append(e)
            elif e.op in ("recv", "irecv") and e.peer is not None and rank not in any_source:
                receives.setdefault((e.group, e.peer, rank), []).append(e)
    for key in dict.fromkeys([*sends, *receives]):
        _, sender, receiver = key
        ours, theirs = sends.get(key, []), receives.get(key, [])
        for index in range(max(len(ours), len(theirs))):
            a = ours[index] if index < len(ours) else None
            b = theirs[index] if index < len(theirs) else None
            if (a is None and not done[sender]) or (b is None and not done[receiver]):
                break
            if a is None or b is None:
                rank, other = (sender, receiver) if a is None else (receiver, sender)
                what = "a receive without its send" if a is None else "a send without its receive"
                yield Mismatch(rank, index, None, other, a or b, what)
                break
            if (a.dtype, a.inputs) != (b.dtype, b.inputs):
                yield Mismatch(sender, index, a, receiver, b, "send and receive differ")
                break
