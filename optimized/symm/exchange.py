"""The host's side of a rank's exchange: arenas, launches, and in words what kernels found wrong. Nothing here waits for a GPU.

One exchange serves one layer call after the other on one stream. What went wrong on the device is known to the host when it
looks: in `settle`, which waits, or when the next call begins.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

from moeproof.optimized.symm.combine import _add_up, _put_sums, _sums_are_there
from moeproof.optimized.symm.cuts import ALONE, Cuts
from moeproof.optimized.symm.dispatch import _dispatch
from moeproof.optimized.symm.launch import Launcher
from moeproof.optimized.symm.layout import NOTICE, TEXT, Layout
from moeproof.optimized.symm.memory import allocate
from moeproof.optimized.symm.signals import STATE, Code
from moeproof.optimized.tiles import interpreted, processors
from moeproof.reference.contract.agreement import agree
from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.link import Link

Tensor = torch.Tensor
T = TypeVar("T")
MEETINGS = ("rows (dispatch)", "sums (combine)")
PATIENCE = 20.0
"""Seconds for which a kernel waits for another rank's signal: as much as ranks may be apart, compilers included."""
LOOKS = 15_000
"""Looks at a signal in a second of the interpreter, about."""
FILL = 1024
"""Ids of absent tokens that one program clears at once."""
WORDS = ((torch.int32, tl.int32), (torch.int16, tl.int16), (torch.uint8, tl.uint8))


@dataclass(frozen=True)
class Received:
    """What this rank holds after a dispatch: R regions of `most` rows. Valid until the call's combine: then peers may write."""

    rows: Tensor
    """(R * most, columns)."""
    scales: Tensor | None
    ids: Tensor
    """int32 (R * most, K): -1 wherever the expert is not here, and throughout rows that did not come."""
    weights: Tensor
    """float32 (R * most, K)."""
    counts: Tensor
    """int32 (e,): pairs of each local expert. Valid until the next dispatch."""


class Exchange:
    """Collective: all ranks make theirs together, with the same layout. `facts` must agree as well.

    `cuts` say how many multiprocessors it takes from what computes meanwhile; a local expert with more than `max_rows` rows
    fails the call.
    """

    def __init__(
        self,
        link: Link,
        layout: Layout,
        facts: dict[str, object],
        patience: float = PATIENCE,
        cuts: Cuts = ALONE,
        max_rows: int = 2**31 - 1,
    ) -> None:
        self.link, self.layout, self.patience, self.max_rows = link, layout, patience, max_rows
        grid = layout.grid
        shared = {"call": "symmetric exchange", "placement": grid, "payload": layout.payload, "most": layout.most, **facts}
        check(link.size == grid.ranks, f"the placement is for {grid.ranks} ranks, the group has {link.size}")
        agree(link, shared, None)
        self.arenas, self._mapping = allocate(link, layout.nbytes)
        self.own = self.arenas[link.rank]
        self.state = torch.zeros(STATE, dtype=torch.int32, device=link.device)
        self.state[0] = 1
        # Kernels write into the host's memory, so that looking at it costs no synchronisation.
        self.notice = torch.zeros(4, dtype=torch.int32, pin_memory=link.device.type == "cuda")
        self.tokens: int | None = None
        """Tokens of the call between dispatch and combine."""
        self.owner: weakref.WeakMethod[Callable[[str], None]] | None = None
        """Called instead of `withdraw` where a call is refused here: of several exchanges all have to be left, in order."""
        self._lost = ""
        """Why this exchange can serve no further call."""
        self.cuts = cuts
        self._per_second = LOOKS if interpreted() else 1e6
        self._prepare_launches()
        self._load_kernels()
        # All have cleared their arenas and loaded their kernels: from here on they may meet inside kernels.
        agree(link, shared, None)

    # Launches.

    def _prepare_launches(self) -> None:
        """What is the same in every call, worked out once: at few tokens the host's own time counts."""
        lay, p, grid, device, me = self.layout, self.layout.payload, self.layout.grid, self.link.device, self.link.rank
        (self._row_view, row_word), row_words = _words(p.row_bytes)
        (self._scale_view, scale_word), scale_words = _words(p.scale_bytes)
        local = [[*grid.local(rank)] for rank in range(grid.ranks)]
        padded = torch.tensor([experts + [-1] * (lay.local - len(experts)) for experts in local], dtype=torch.int32)
        group_of = grid.group_of().to(device, torch.int32)
        tally = torch.zeros(grid.experts, dtype=torch.int32, device=device)
        going = torch.zeros(lay.most, dtype=torch.int64, device=device)
        common = (self.arenas, self.own, self.state, self.notice)
        counts = torch.empty(lay.local, dtype=torch.int32, device=device)
        there = {name: lay.view(self.own, name) for name in ("rows", "scales", "ids", "weights")}
        there["scales"] = there["scales"] if p.scale_columns else None
        self.received = Received(counts=counts[: len(local[me])], **there)
        power, sms, cuts = triton.next_power_of_2, processors(device), self.cuts
        meeting = {"RANKS": grid.ranks, "CLOCK": not interpreted()}
        self._put_programs, self._sums_programs, self._add_programs = (
            cut.programs(sms) for cut in (cuts.put, cuts.sums, cuts.add)
        )
        self._launch_dispatch = Launcher(
            _dispatch,
            (
                *(*common, group_of, padded.to(device), going, tally, counts),
                *self._at("signals", "notices", "tokens", "counts", "ids", "weights", "scales", "rows"),
                *(lay.most, self.max_rows, p.slots, grid.experts, lay.local, row_words, scale_words, me),
            ),
            free=4,
            **meeting,
            TP=grid.tp,
            SLOTS=power(p.slots),
            EXPERTS=power(lay.local),
            WORD=row_word,
            SCALE_WORD=scale_word,
            **cuts.put.shape(row_words, 4),
            SCALE_BLOCK=cuts.put.shape(scale_words, 1)["BLOCK"],
            FILL=FILL,
        )
        at_sums = (*common, *self._at("signals", "notices", "tokens", "parts"), lay.most, p.hidden, me)
        shape = cuts.sums.shape(p.hidden, 8)
        # A rank that refuses has nothing to leave behind, and meets in the same launch.
        self._leaving = torch.empty(grid.ranks, lay.most, p.hidden, device=device) if cuts.copied_sums else None
        self._launch_sums = {
            (leaving is not None, weighted): Launcher(
                _put_sums, (*at_sums, leaving), free=3, **meeting, **shape, K=p.slots, WEIGHTED=weighted
            )
            for leaving in {None, self._leaving}
            for weighted in (True, False)
        }
        at_meeting = (*common, *self._at("signals", "notices"), me)
        self._launch_meeting = Launcher(_sums_are_there, at_meeting, free=2, **meeting, num_warps=4)
        shape = cuts.add.shape(p.hidden, 8)
        at_add = (self.own, self.state, going, *self._at("parts"), lay.most, p.hidden)
        self._launch_add = Launcher(_add_up, at_add, free=2, RANKS=grid.ranks, **shape)
        self._add_blocks = -(-p.hidden // shape["BLOCK"])
        self._their_rows = [lay.view(arena, "rows")[lay.region(me)] for arena in self.arenas]
        self._their_parts = [lay.view(arena, "parts")[me] for arena in self.arenas]

    def _at(self, *names: str) -> tuple[int, ...]:
        return tuple(self.layout.offset(name) for name in names)

    @property
    def _limit(self) -> int:
        return int(self.patience * self._per_second)

    def _nothing(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
        """(rows, scales, ids, weights, y) for a launch that looks at none of them."""
        p, device = self.layout.payload, self.link.device
        scales = torch.empty(1, p.scale_columns, dtype=p.scale_dtype, device=device) if p.scale_columns else None
        return (
            torch.empty(1, p.columns, dtype=p.dtype, device=device),
            scales,
            torch.empty(1, p.slots, dtype=torch.int32, device=device),
            torch.empty(1, p.slots, device=device),
            torch.empty(1, p.hidden, dtype=p.returned, device=device),
        )

    def _load_kernels(self) -> None:
        """A kernel that is loaded while another one spins may have to wait for it: so all are loaded before any spins."""
        rows, scales, ids, weights, y = self._nothing()
        self._put_rows(rows, scales, ids, weights, 0, refused=False, dry=True)
        for places in (None, ids):
            for weighted in (True, False) if self.layout.payload.slots == 1 else (True,):
                for refused in {False, self.cuts.copied_sums}:
                    self._put_sums(y, places, ids, weights, weighted, refused=refused, dry=True)
        self._add_up(y, dry=True)
        self._launch_meeting((1, 1, 1), (), (self._limit, 1))

    def as_words(self, rows: Any, scales: Tensor | None) -> tuple[Any, Tensor | None]:
        """Rows and scales as kernels move them: in the widest integers that both kinds are made of."""
        return (
            None if rows is None else rows.view(self._row_view),
            None if scales is None else scales.view(self._scale_view),
        )

    def _put_rows(
        self, rows: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor, tokens: int, refused: bool, dry: bool = False
    ) -> None:
        lay = self.layout
        work = max(-(-tokens // self.cuts.put.rows), -(-(lay.most - tokens) * lay.payload.slots // FILL), 1)
        rows, scales = self.as_words(None if self.cuts.copied_rows else rows, scales)
        self._launch_dispatch(
            (1 if dry else min(work, self._put_programs), 1, 1),
            (rows, scales, ids, weights),
            (
                *(0 if rows is None else rows.stride(0), 0 if scales is None else scales.stride(0)),
                *(*ids.stride(), *weights.stride()),
                *(tokens, int(refused), self._limit, int(dry)),
            ),
        )

    def _put_sums(
        self, y: Tensor, places: Tensor | None, ids: Tensor, weights: Tensor, weighted: bool, refused: bool, dry: bool = False
    ) -> None:
        tiles = -(-self.layout.most // self.cuts.sums.rows) * self.layout.grid.ranks
        self._launch_sums[self.cuts.copied_sums and not refused, weighted](
            (1 if dry or refused else min(tiles, self._sums_programs), 1, 1),
            (y, places, ids, weights),
            (y.stride(0), int(refused), self._limit, int(dry)),
        )

    def _add_up(self, output: Tensor, dry: bool = False) -> None:
        tiles = -(-output.size(0) // self.cuts.add.rows) * self._add_blocks
        numbers = (*output.stride(), output.size(0), int(dry))
        self._launch_add((min(tiles, self._add_programs), 1, 1), (output,), numbers)

    # Calls.

    def dispatch(self, rows: Tensor, scales: Tensor | None, ids: Tensor, weights: Tensor) -> Received:
        """Rows (T, columns) and their scales, with ids and weights (T, K), to the ranks of their experts; what came here.

        Raises what the last call left to be said, and releases the other ranks.
        """
        self._check_usable()
        if self.tokens is not None:
            raise self.fail("a dispatch before the combine of the last one")
        if reason := self._heard():
            raise self.fail(reason)
        self.tokens = rows.size(0)
        if self.cuts.copied_rows:
            for there in self._in_turn(self._their_rows):
                there[: self.tokens].copy_(rows)
        self._put_rows(rows, scales, ids, weights, self.tokens, refused=False)
        return self.received

    def _in_turn(self, theirs: Sequence[T]) -> Sequence[T]:
        """From this rank on, so that no rank is everybody's target."""
        return [*theirs[self.link.rank :], *theirs[: self.link.rank]]

    def combine(
        self, output: Tensor, y: Tensor, ids: Tensor, weights: Tensor, weighted: bool, places: Tensor | None = None
    ) -> None:
        """output (T, hidden) = sums over ranks of the sums over slots of w * y. Slot s of row i is i * K + s.

        y (n, hidden): row = slot, live where ids (R * most, K) >= 0; with `places` (R * most * K,) row = places[slot], live
        where that is >= 0. ids and weights are contiguous.
        """
        self.check_begun()
        tokens, self.tokens = self.tokens, None
        self._put_sums(y, places, ids, weights, weighted, refused=False)
        if self._leaving is not None:
            for there, leaving in self._in_turn([*zip(self._their_parts, self._leaving, strict=True)])[1:]:
                there.copy_(leaving)
            self._launch_meeting((1, 1, 1), (), (self._limit, 0))
        if tokens:
            self._add_up(output)

    def check_begun(self) -> None:
        """Refuse a combine without a dispatch before it: no rank waits for that one."""
        self._check_usable()
        check(self.tokens is not None, "finalize without a prepare before it")

    def _check_usable(self) -> None:
        if self._lost:
            raise ContractError(f"this exchange cannot go on: {self._lost}")

    # What goes wrong.

    def withdraw(self, reason: str) -> None:
        """Join the rest of this call's meetings with empty hands, and let the others know why."""
        self.withdraw_rows(reason)
        self.withdraw_sums()

    def withdraw_rows(self, reason: str) -> None:
        """Put the reason down, and join the first meeting where this call has still to have it."""
        if self._lost:
            return
        words = torch.zeros(NOTICE, dtype=torch.int32)
        words[0] = int(Code.REFUSED)
        text = reason.encode()[: 4 * (NOTICE - TEXT)]
        words[TEXT:] = torch.frombuffer(bytearray(text.ljust(4 * (NOTICE - TEXT), b"\0")), dtype=torch.int32)
        self.layout.view(self.own, "notices")[self.link.rank].copy_(words)
        if self.tokens is None:
            rows, scales, ids, weights, _ = self._nothing()
            self._put_rows(rows, scales, ids, weights, 0, refused=True)

    def withdraw_sums(self) -> None:
        """Join the second meeting."""
        if self._lost:
            return
        self.tokens = None
        _, _, ids, weights, y = self._nothing()
        self._put_sums(y, None, ids, weights, weighted=True, refused=True)

    def refuse(self, reason: str) -> None:
        """This rank alone finds that something is wrong: let the others know before it leaves."""
        owner = None if self.owner is None else self.owner()
        (owner or self.withdraw)(reason)

    def fail(self, reason: str) -> ContractError:
        """The same, and what to raise."""
        self.refuse(reason)
        return ContractError(reason)

    def settle(self) -> None:
        """Wait for the device, and raise ContractError where the last call failed on it."""
        if self.link.device.type == "cuda":
            torch.cuda.synchronize(self.link.device)
        if reason := self._heard():
            raise ContractError(reason)

    def _heard(self) -> str:
        """What the kernels wrote down since the last look, in words; empty where all is well."""
        code, first, second, call = self.notice.tolist()
        if code == Code.FINE:
            return ""
        self.notice.zero_()
        me = self.link.rank
        if code == Code.LATE:
            self._lost = _late(me, first, second, call, self.patience)
            return self._lost
        if code == Code.FULL:
            return _full(self.layout, me, first, second)
        notice = self.layout.view(self.own, "notices")[first].cpu()
        return f"rank {first} refused: {_words_of(self.layout, first, notice, call, self.patience)} (this call has no result)"


def _late(me: int, rank: int, meeting: int, call: int, patience: float) -> str:
    what = MEETINGS[meeting]
    return f"rank {me} waited {patience:g} s for the {what} of rank {rank} in call {call}: it is late, stopped or gone"


def _full(layout: Layout, rank: int, local: int, rows: int) -> str:
    expert = layout.grid.local(rank)[local]
    return f"expert {expert} gets {rows} rows, more than its region of the batched layout holds"


def _words_of(layout: Layout, rank: int, notice: Tensor, call: int, patience: float) -> str:
    """Another rank's notice in words."""
    code, first, second, _ = notice[:TEXT].tolist()
    if code == Code.LATE:
        return _late(rank, first, second, call, patience)
    if code == Code.FULL:
        return _full(layout, rank, first, second)
    return notice[TEXT:].numpy().tobytes().rstrip(b"\0").decode(errors="replace")


def _words(nbytes: int) -> tuple[tuple[torch.dtype, tl.dtype], int]:
    """(the widest integers, for torch and for Triton, that a row of so many bytes is made of; how many)."""
    word = next(w for w in WORDS if nbytes % w[0].itemsize == 0)
    return word, nbytes // word[0].itemsize
