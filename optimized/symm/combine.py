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


@triton.jit(do_not_specialize=("me", "refused", "limit", "dry"))
def _put_sums(
    arenas, own, state, notice, at_signals, at_notices, at_tokens, at_parts, most, H, me,
    y, places, ids, weights, stride_y, refused, limit, dry,
    K: tl.constexpr, WEIGHTED: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, CLOCK: tl.constexpr,
):  # fmt: skip
    """y row of slot s: s itself where its id is live, or places[s] where `places` is given (-1 = none)."""
    if dry != 0:
        return
    program, programs = tl.program_id(0), tl.num_programs(0)
    longest = tl.full([], 0, tl.int32)
    if refused == 0:
        for r in tl.static_range(RANKS):
            longest = tl.maximum(longest, tl.load(field(own, at_tokens, tl.int32) + r))
    # Neighbouring programs send to different ranks, so that no rank is everybody's target.
    for turn in range(program, longest * RANKS, programs):
        source, token = (turn + me) % RANKS, turn // RANKS
        row = source.to(tl.int64) * most + token
        live = tl.full([], 0, tl.int32)
        for k in tl.static_range(K):
            live |= (tl.load((ids if places is None else places) + row * K + k) >= 0).to(tl.int32)
        if live != 0:
            home = field(arena_of(arenas, source, RANKS), at_parts, tl.float32) + (me.to(tl.int64) * most + token) * H
            for first in range(0, H, BLOCK):
                h = first + tl.arange(0, BLOCK)
                total = tl.zeros([BLOCK], tl.float32)
                for k in tl.static_range(K):
                    slot = row * K + k
                    at = tl.load((ids if places is None else places) + slot)
                    if places is None:
                        at = tl.where(at >= 0, slot, -1)
                    value = tl.load(y + at.to(tl.int64) * stride_y + h, mask=(h < H) & (at >= 0), other=0.0).to(tl.float32)
                    if WEIGHTED:
                        value *= tl.load(weights + slot, mask=at >= 0, other=0.0).to(tl.float32)
                    total += value
                tl.store(home + h, total, mask=h < H)
    if last_to_arrive(state):
        meet(arenas, own, state, notice, at_signals, at_notices, me, refused, limit, SUMS_COME_BACK, RANKS, CLOCK)
        tl.store(state + CALL, tl.load(state + CALL) + 1)


@triton.jit(do_not_specialize=("dry",))
def _add_up(own, state, going_T, at_parts, most, H, out, stride_t, stride_h, dry, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sums of the ranks that the token went to; NaN where the call failed, so that nobody takes it for a result."""
    if dry != 0:
        return
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    going = tl.load(going_T + token)
    total = tl.zeros([BLOCK], tl.float32)
    for r in tl.static_range(RANKS):
        came = ((going >> r) & 1) != 0
        part = field(own, at_parts, tl.float32) + (r * most + token) * H
        total += tl.load(part + h, mask=(h < H) & came, other=0.0)
    total = tl.where(tl.load(state + FAILED) == FINE, total, float("nan"))
    tl.store(out + token * stride_t + h.to(tl.int64) * stride_h, total.to(out.dtype.element_ty), mask=h < H)
