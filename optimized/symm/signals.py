"""How kernels of different ranks meet: one signal from each rank to each, after its data, and a bounded wait for all others.

Why what arrives is complete. Each hop is a release by the one who wrote and an acquire by the one who reads, both at system
scope, and causality is transitive:
1. All threads of a program store their rows, also those in a peer's memory, with plain stores. The barrier of the program
   orders them before the one thread that goes on.
2. That thread adds to the arrival counter of its own GPU, acquiring and releasing. The last program to arrive has therefore
   acquired what every other one wrote.
3. The last program's exchange into the peer's signal releases all of that. The peer acquires the signal before it reads.
4. The kernel that reads the rows comes later on the same stream.

Why no buffer needs a twin, nor a barrier before it is used again. A call has two meetings: after the rows have gone out, and
after the sums have come back. Rank s writes rows of call n+1 into d only after its second meeting of call n, which d joins
when all that read the rows of call n have ended, since they precede on d's stream. d writes sums of call n+1 into s only
after the first meeting of call n+1, which s joins after it has read the sums of call n. A rank that refuses a call joins its
meetings all the same, with empty hands. So a rank is never more than one meeting ahead, and a signal is never overwritten
before it is seen.

A signal is 2 * call, plus 1 from a rank that cannot go on; its notice says why, and is written before the signal.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from enum import IntEnum

import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer


class Code(IntEnum):
    """What went wrong on a rank. In a notice: code, and the numbers that belong to it."""

    FINE = 0
    REFUSED = 1
    """The host refused; the notice holds its words."""
    LATE = 2
    """(rank, meeting): this rank's signal did not come in time."""
    FULL = 3
    """(local expert, rows): more rows than the region of the expert holds."""
    TOLD = 4
    """(rank, meeting): that rank's notice says why."""


FINE, REFUSED, LATE, FULL, TOLD = (tl.constexpr(int(code)) for code in Code)
CALL, ARRIVED, FAILED = (tl.constexpr(n) for n in range(3))
"""Words of a rank's own state: number of the call, programs that have arrived, Code of the call."""
STATE = 3
NOTICE = tl.constexpr(128)


@triton.jit
def field(arena, offset, dtype: tl.constexpr):
    """A typed pointer into an arena of bytes."""
    return (arena + offset).to(tl.pointer_type(dtype))


@triton.jit
def arena_of(arenas, rank, RANKS: tl.constexpr):
    """The arena of a rank that is known at run time only."""
    chosen = arenas[0]
    for r in tl.static_range(1, RANKS):
        chosen = tl.where(rank == r, arenas[r], chosen)
    return chosen


@triton.jit
def last_to_arrive(state):
    """Whether all other programs of this launch have done what stands before this line."""
    tl.debug_barrier()  # all threads' stores come before the one thread that counts
    last = tl.atomic_add(state + ARRIVED, 1, sem="acq_rel", scope="sys") == tl.num_programs(0) - 1
    if last:
        tl.atomic_xchg(state + ARRIVED, 0, sem="relaxed")  # for the next launch
    return last


@triton.jit
def wait_for(signal, least, limit, CLOCK: tl.constexpr):
    """The signal once it is at least `least`, or what it is after `limit`: microseconds by the CLOCK, else looks."""
    seen = tl.atomic_add(signal, 0, sem="acquire", scope="sys")
    start = tl.full([], 0, tl.int64)
    if CLOCK:
        start = globaltimer()
    spent = tl.full([], 0, tl.int64)
    while (seen < least) & (spent < limit):
        seen = tl.atomic_add(signal, 0, sem="acquire", scope="sys")
        if CLOCK:
            spent = (globaltimer() - start) // 1000
        else:
            spent += 1
    return seen


@triton.jit
def tell(own, state, notice, notices, me, code, first, second):
    """Note why this rank cannot go on: for its own host, and for the other ranks unless it heard from them."""
    tl.store(state + FAILED, code)
    tl.store(notice + 1, first)
    tl.store(notice + 2, second)
    tl.store(notice + 3, tl.load(state + CALL))
    if code != TOLD:
        mine = field(own, notices, tl.int32) + me * NOTICE
        tl.store(mine, code)
        tl.store(mine + 1, first)
        tl.store(mine + 2, second)
    tl.debug_barrier()
    tl.store(notice, code)


@triton.jit
def meet(
    arenas, own, state, notice, signals, notices, me, refused, limit,
    MEETING: tl.constexpr, RANKS: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """Signal all ranks and wait for all: what this program wrote, and all it has acquired, is theirs after it.

    `refused`: this rank's host says that it cannot go on, and has put its words into this rank's own notice.
    """
    call = tl.load(state + CALL)
    failed = tl.load(state + FAILED)
    cannot = (refused != 0) | (failed == LATE) | (failed == FULL)
    if cannot:
        word = tl.arange(0, NOTICE)
        mine = tl.load(field(own, notices, tl.int32) + me * NOTICE + word)
        for r in tl.static_range(RANKS):
            tl.store(field(arenas[r], notices, tl.int32) + me * NOTICE + word, mine, mask=me != r)
    tl.debug_barrier()
    for r in tl.static_range(RANKS):
        there = field(arenas[r], signals, tl.int32) + MEETING * RANKS + me
        tl.atomic_xchg(there, 2 * call + cannot.to(tl.int32), sem="release", scope="sys")
    # A rank that was too late once has lost step with the others: they must not wait for each other again.
    if failed != LATE:
        for r in tl.static_range(RANKS):
            here = field(own, signals, tl.int32) + MEETING * RANKS + r
            seen = wait_for(here, 2 * call, limit, CLOCK)
            late = (seen < 2 * call) & (failed != LATE)
            told = (seen == 2 * call + 1) & (failed == FINE) & (refused == 0)
            if late:
                tell(own, state, notice, notices, me, LATE, r, MEETING)
            if told:
                tell(own, state, notice, notices, me, TOLD, r, MEETING)
            failed = tl.where(late, LATE, tl.where(told, TOLD, failed))
            limit = tl.where(late, 0, limit)  # the others had as long
        tl.debug_barrier()
