"""DISPATCH in one launch: rows, scales, ids, weights and counts go straight to their places in the peers' arenas.

A token's row goes once to every rank that holds one of its experts. Its place is its own: row `token` of this rank's region,
so no position has to be counted or asked for, and the sums find their way home without a map. Its ids and weights go to every
rank, -1 wherever the expert is not there: a row that did not travel has no live id.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moeproof.optimized.symm.room import kept_within
from moeproof.optimized.symm.signals import FAILED, FINE, LATE, field, last_to_arrive, meet

ROWS_GO_OUT = tl.constexpr(0)
"""The first meeting of a call."""


@triton.jit
def _take(source, first, words, real, BLOCK: tl.constexpr):
    """(ROWS, BLOCK): words `first` .. of each row at `source`."""
    word = first + tl.arange(0, BLOCK)
    return tl.load(source[:, None] + word[None, :], mask=real[:, None] & (word < words)[None, :])


@triton.jit
def _put(taken, arenas, offset, at, first, words, going, WORD: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr):
    """What was taken to the ranks whose bit is set in a row's `going`: the row begins at word `at` of the field there."""
    word = first + tl.arange(0, BLOCK)
    for r in tl.static_range(RANKS):
        there = ((going >> r) & 1) != 0
        tl.store(
            field(arenas[r], offset, WORD) + at[:, None] + word[None, :],
            taken,
            mask=there[:, None] & (word < words)[None, :],
        )


@triton.jit(do_not_specialize=("me", "T", "refused", "limit", "dry"))
def _dispatch(
    arenas, own, state, notice, group_of, local_experts, going_T, tally, counts,
    at_signals, at_notices, at_tokens, at_counts, at_ids, at_weights, at_scales, at_rows,
    most, max_rows, K, E, LOCAL, row_words, scale_words, me,
    rows, scales, ids, weights, stride_row, stride_scale, stride_id, stride_idk, stride_w, stride_wk,
    T, refused, limit, dry,
    RANKS: tl.constexpr, TP: tl.constexpr, SLOTS: tl.constexpr, EXPERTS: tl.constexpr, WORD: tl.constexpr,
    SCALE_WORD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr, FILL: tl.constexpr,
    CLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes ROWS tokens at a time, and their rows in steps of BLOCK words: all of a step are on their way at once.

    Without `rows` somebody else has put them before this launch.
    """
    if dry != 0:
        return
    program, programs = tl.program_id(0), tl.num_programs(0)
    slot = tl.arange(0, SLOTS)[None, :]
    region = me.to(tl.int64) * most
    for first_token in range(program * ROWS, T, programs * ROWS):
        token = tl.full([], 0, tl.int64) + first_token + tl.arange(0, ROWS)
        real = token < T
        # Asked for first: rows are on their way while ids are looked at.
        if rows is not None:
            taken = _take(rows + token * stride_row, 0, row_words, real, BLOCK)
        live = real[:, None] & (slot < K)
        expert = tl.load(ids + token[:, None] * stride_id + slot * stride_idk, mask=live, other=-1).to(tl.int32)
        expert = tl.where((expert >= 0) & (expert < E), expert, -1)
        weight = tl.load(weights + token[:, None] * stride_w + slot * stride_wk, mask=live, other=0.0).to(tl.float32)
        group = tl.load(group_of + expert, mask=expert >= 0, other=-1)
        tl.atomic_add(tally + expert, 1, mask=expert >= 0, sem="relaxed")
        going = tl.zeros([ROWS], tl.int64)
        place = (region + token)[:, None] * K + slot
        for r in tl.static_range(RANKS):
            here = group == r // TP
            going |= tl.max(here.to(tl.int64), 1) << r
            tl.store(field(arenas[r], at_ids, tl.int32) + place, tl.where(here, expert, -1), mask=live)
            tl.store(field(arenas[r], at_weights, tl.float32) + place, weight, mask=live)
        tl.store(going_T + token, going, mask=real)
        if rows is not None:
            at = (region + token) * row_words
            _put(taken, arenas, at_rows, at, 0, row_words, going, WORD, RANKS, BLOCK)
            for first in range(BLOCK, row_words, BLOCK):
                taken = _take(rows + token * stride_row, first, row_words, real, BLOCK)
                _put(taken, arenas, at_rows, at, first, row_words, going, WORD, RANKS, BLOCK)
        if scales is not None:
            at = (region + token) * scale_words
            for first in range(0, scale_words, SCALE_BLOCK):
                scale = _take(scales + token * stride_scale, first, scale_words, real, SCALE_BLOCK)
                _put(scale, arenas, at_scales, at, first, scale_words, going, SCALE_WORD, RANKS, SCALE_BLOCK)
    # Places of tokens that this rank does not have may hold those of an earlier call.
    for first in range(T * K + program * FILL, most * K, programs * FILL):
        place = first + tl.arange(0, FILL)
        for r in tl.static_range(RANKS):
            tl.store(
                field(arenas[r], at_ids, tl.int32) + region * K + place,
                tl.full([FILL], -1, tl.int32),
                mask=place < most * K,
            )
    if last_to_arrive(state):
        e = tl.arange(0, EXPERTS)
        for r in tl.static_range(RANKS):
            there = tl.load(local_experts + r * LOCAL + e, mask=e < LOCAL, other=-1)
            sent = tl.load(tally + there, mask=there >= 0, other=0)
            tl.store(field(arenas[r], at_counts, tl.int32) + me * LOCAL + e, sent, mask=e < LOCAL)
            tl.store(field(arenas[r], at_tokens, tl.int32) + me, T)
        tl.debug_barrier()  # counted before they are cleared
        for first in range(0, E, EXPERTS):
            tl.store(tally + first + e, 0, mask=first + e < E)
        if tl.load(state + FAILED) != LATE:
            tl.store(state + FAILED, FINE)
        tl.debug_barrier()
        meet(arenas, own, state, notice, at_signals, at_notices, me, refused, limit, ROWS_GO_OUT, RANKS, CLOCK)
        total = tl.full([EXPERTS], 0, tl.int32)
        for r in tl.static_range(RANKS):
            total += tl.load(field(own, at_counts, tl.int32) + r * LOCAL + e, mask=e < LOCAL, other=0)
        tl.store(counts + e, kept_within(total, max_rows, own, state, notice, at_notices, me, EXPERTS), mask=e < LOCAL)
