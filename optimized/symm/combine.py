"""COMBINE in two launches: weighted sums of this rank's experts go to the tokens' ranks, and each rank adds what came to it.

Both sums are taken in float32 and in a fixed order: a rank's slots from the first to the last, then ranks from the first to
the last; one rounding at the end. So the same call gives the same bits.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moeproof.optimized.symm.signals import CALL, FAILED, FINE, arena_of, field, last_to_arrive, meet

SUMS_COME_BACK = tl.constexpr(1)
"""The second meeting of a call."""


@triton.jit
def _meet_after_sums(
    arenas, own, state, notice, signals, notices, me, refused, limit, RANKS: tl.constexpr, CLOCK: tl.constexpr
):  # fmt: skip
    meet(arenas, own, state, notice, signals, notices, me, refused, limit, SUMS_COME_BACK, RANKS, CLOCK)
    tl.store(state + CALL, tl.load(state + CALL) + 1)


@triton.jit(do_not_specialize=("me", "refused", "limit", "dry"))
def _put_sums(
    arenas, own, state, notice, at_signals, at_notices, at_tokens, at_parts, most, H, me, leaving,
    y, places, ids, weights, stride_y, refused, limit, dry,
    K: tl.constexpr, WEIGHTED: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """y row of slot s: s itself where its id is live, or places[s] where `places` is given (-1 = none).

    A program takes ROWS tokens of one rank at a time. With `leaving`, (R, most, H) on this GPU, what goes to other ranks is
    left there for somebody else to copy, and the meeting is the next launch's: _sums_are_there.
    """
    if dry != 0:
        return
    program, programs = tl.program_id(0), tl.num_programs(0)
    longest = tl.full([], 0, tl.int32)
    if refused == 0:
        for r in tl.static_range(RANKS):
            longest = tl.maximum(longest, tl.load(field(own, at_tokens, tl.int32) + r))
    # Neighbouring programs send to different ranks, so that no rank is everybody's target.
    for turn in range(program, (longest + ROWS - 1) // ROWS * RANKS, programs):
        source = (turn + me) % RANKS
        token = turn // RANKS * ROWS + tl.arange(0, ROWS)
        real = token < longest
        region = source.to(tl.int64) * most
        live = tl.zeros([ROWS], tl.int32)
        for k in tl.static_range(K):
            where = tl.load((ids if places is None else places) + (region + token) * K + k, mask=real, other=-1)
            live |= (where >= 0).to(tl.int32)
        if tl.max(live, 0) != 0:
            mine = me.to(tl.int64) * most * H
            home = field(arena_of(arenas, source, RANKS), at_parts, tl.float32) + mine
            if leaving is not None:
                home = tl.where(source == me, home, leaving + region * H)
            for first in range(0, H, BLOCK):
                h = first + tl.arange(0, BLOCK)
                # Every slot's row is asked for before the first is waited for. (Triton's tuples cannot be unpacked: RUF005.)
                values = ()
                factors = ()
                for k in tl.static_range(K):
                    slot = (region + token) * K + k
                    at = tl.load((ids if places is None else places) + slot, mask=real, other=-1)
                    there = at >= 0
                    if places is None:
                        at = tl.where(there, slot, -1)
                    row = y + at.to(tl.int64)[:, None] * stride_y
                    values = values + (tl.load(row + h[None, :], mask=there[:, None] & (h < H)[None, :], other=0.0),)  # noqa: RUF005
                    if WEIGHTED:
                        factors = factors + (tl.load(weights + slot, mask=there, other=0.0).to(tl.float32),)  # noqa: RUF005
                total = tl.zeros([ROWS, BLOCK], tl.float32)
                for k in tl.static_range(K):
                    value = values[k].to(tl.float32)
                    if WEIGHTED:
                        value *= factors[k][:, None]
                    total += value
                inside = (live != 0)[:, None] & (h < H)[None, :]
                tl.store(home + token.to(tl.int64)[:, None] * H + h[None, :], total, mask=inside)
    if leaving is None:  # noqa: SIM102  (known when it is compiled, and the next one is not)
        if last_to_arrive(state):
            _meet_after_sums(arenas, own, state, notice, at_signals, at_notices, me, refused, limit, RANKS, CLOCK)


@triton.jit(do_not_specialize=("me", "limit", "dry"))
def _sums_are_there(
    arenas, own, state, notice, at_signals, at_notices, me, limit, dry, RANKS: tl.constexpr, CLOCK: tl.constexpr
):  # fmt: skip
    """The second meeting by itself: what precedes it on the stream, copies too, is the other ranks' after it."""
    if dry != 0:
        return
    _meet_after_sums(arenas, own, state, notice, at_signals, at_notices, me, 0, limit, RANKS, CLOCK)


@triton.jit(do_not_specialize=("T", "dry"))
def _add_up(
    own, state, going_T, at_parts, most, H, out, stride_t, stride_h, T, dry,
    RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the sums of the ranks that the token went to; NaN where the call failed, so that nobody takes it for a result."""
    if dry != 0:
        return
    blocks = (H + BLOCK - 1) // BLOCK
    for turn in range(tl.program_id(0), (T + ROWS - 1) // ROWS * blocks, tl.num_programs(0)):
        token = tl.full([], 0, tl.int64) + turn // blocks * ROWS + tl.arange(0, ROWS)
        h = turn % blocks * BLOCK + tl.arange(0, BLOCK)
        inside = (token < T)[:, None] & (h < H)[None, :]
        going = tl.load(going_T + token, mask=token < T, other=0)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for r in tl.static_range(RANKS):
            came = ((going >> r) & 1) != 0
            part = field(own, at_parts, tl.float32) + (r * most + token)[:, None] * H + h[None, :]
            total += tl.load(part, mask=inside & came[:, None], other=0.0)
        total = tl.where(tl.load(state + FAILED) == FINE, total, float("nan"))
        at = out + token[:, None] * stride_t + h.to(tl.int64)[None, :] * stride_h
        tl.store(at, total.to(out.dtype.element_ty), mask=inside)
