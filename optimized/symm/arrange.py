"""From rows as they arrived to the batched layout: one launch where few slots may come, three where many may."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.align import STEP, _chunks, _count, _experts_padded, _place
from moeproof.optimized.slots import Slots, local_expert
from moeproof.optimized.symm.exchange import Exchange
from moeproof.optimized.symm.launch import Launcher
from moeproof.optimized.tiles import interpreted

Tensor = torch.Tensor
FEW = 4096
"""Slots that every program counts for itself."""
BLOCK = 1024
"""Words of a row that a program moves."""


@triton.jit
def _arrange(
    arrived, scales, places, ids, expert_map, num_slots, num_experts, num_local, K, max_rows, row_words, scale_words,
    out, out_scales,
    ALL: tl.constexpr, MINE: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SCALE_BLOCK: tl.constexpr,
):  # fmt: skip
    """out[places[slot]] = the row of the slot's token. With ALL, a power of two, `places` is found here, else it is there."""
    step = tl.arange(0, MINE)
    slot = tl.program_id(0) * MINE + step
    real = slot < num_slots
    if ALL > 0:
        every = tl.arange(0, ALL)
        local = local_expert(every, every < num_slots, ids, expert_map, K, 1, num_experts, num_local, K)
        earlier_program = (local >= 0) & (every < tl.program_id(0) * MINE)
        before = tl.histogram(tl.maximum(local, 0), EXPERTS, mask=earlier_program)
        mine = local_expert(slot, real, ids, expert_map, K, 1, num_experts, num_local, K)
        earlier = (mine[:, None] == mine[None, :]) & (step[:, None] < step[None, :])
        position = tl.gather(before, tl.maximum(mine, 0), 0) + tl.sum(earlier.to(tl.int32), 0)
        row = tl.where((mine >= 0) & (position < max_rows), mine * max_rows + position, -1)
        if tl.program_id(1) == 0:
            tl.store(places + slot, row, mask=real)
    else:
        row = tl.load(places + slot, mask=real, other=-1)
    live = (row >= 0)[:, None]
    token, row = (slot // K).to(tl.int64)[:, None], row.to(tl.int64)[:, None]
    word = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = live & (word < row_words)
    tl.store(out + row * row_words + word, tl.load(arrived + token * row_words + word, mask=inside), mask=inside)
    if scales is not None:  # noqa: SIM102  (known when it is compiled, and the next one is not)
        if tl.program_id(1) == 0:
            for first in range(0, scale_words, SCALE_BLOCK):
                column = first + tl.arange(0, SCALE_BLOCK)[None, :]
                there = live & (column < scale_words)
                scale = tl.load(scales + token * scale_words + column, mask=there)
                tl.store(out_scales + row * scale_words + column, scale, mask=there)


class Arrangement:
    """The batched layout of one exchange: (e, max_rows, .), rows of an expert in (source rank, token, slot) order."""

    def __init__(self, exchange: Exchange, num_local: int, max_rows: int, expert_map: Tensor | None) -> None:
        got, p = exchange.received, exchange.layout.payload
        slots = Slots(got.ids, exchange.layout.grid.experts, num_local, expert_map)
        self._rows, self._scales = exchange.as_words(got.rows, got.scales)
        self._shape = (num_local, max_rows)
        self._columns = (p.columns, p.dtype), (p.scale_columns, p.scale_dtype)
        self._exchange = exchange
        self.places = torch.empty(slots.count, dtype=torch.int32, device=got.ids.device)
        """Row of each arrived slot in the batched layout, -1 where it has none."""
        experts = _experts_padded(num_local)
        few = slots.count <= FEW
        row_words, scale_words = self._rows.size(1), 0 if self._scales is None else self._scales.size(1)
        mine = 128 if interpreted() else 8
        block = min(triton.next_power_of_2(row_words), BLOCK)
        self._grid = (triton.cdiv(slots.count, mine), triton.cdiv(row_words, block), 1)
        self._move = Launcher(
            _arrange,
            (
                *(self._rows, self._scales, self.places, got.ids, expert_map),
                *(slots.count, slots.num_experts, num_local, slots.K, max_rows, row_words, scale_words),
            ),
            ALL=max(triton.next_power_of_2(slots.count), mine) if few else 0,
            MINE=mine,
            EXPERTS=experts,
            BLOCK=block,
            SCALE_BLOCK=min(triton.next_power_of_2(max(scale_words, 1)), BLOCK),
            num_warps=8,
        )
        self._find = () if few else self._finders(slots, experts, max_rows)

    def _finders(self, slots: Slots, experts: int, max_rows: int) -> tuple[tuple[Launcher, tuple[int, int, int]], ...]:
        """Launches that fill `places`: as align.batch_rows, with nothing to be looked up in a call."""
        chunk, chunks = _chunks(slots.count)
        histogram = torch.empty(chunks, experts, dtype=torch.int32, device=slots.ids.device)
        counts = torch.empty(slots.num_local, dtype=torch.int32, device=slots.ids.device)
        shared = {"CHUNK": chunk, "EP": experts, "STEP": STEP, "OVERLAP": False}
        count = Launcher(_count, (histogram, None, slots.count, 0, *slots.arguments), **shared, FILL=0)
        place = Launcher(
            _place,
            (histogram, self.places, counts, None, None, slots.count, chunks, 0, max_rows, *slots.arguments),
            **shared,
            BLOCK_M=0,
            MAP=0,
            ROWS=max(1, 4096 // experts),
            BLOCKS=1,
        )
        return (count, (chunks, 1, 1)), (place, (chunks, 1, 1))

    def __call__(self) -> tuple[Tensor, Tensor | None]:
        """(rows, scales) in the batched layout; `places` with them."""
        for launch, grid in self._find:
            launch(grid)
        device = self.places.device
        (columns, dtype), (scale_columns, scale_dtype) = self._columns
        rows = torch.empty(*self._shape, columns, dtype=dtype, device=device)
        scales = torch.empty(*self._shape, scale_columns, dtype=scale_dtype, device=device) if scale_columns else None
        self._move(self._grid, self._exchange.as_words(rows, scales))
        return rows, scales
