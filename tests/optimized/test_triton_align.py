"""PERMUTE: the counting sort must equal the sort by hand, in every element of every output."""

from __future__ import annotations

import pytest
import torch
from plain_layer import DEVICE, local_index, random_ids, strided

import moeproof.optimized.align as align_module
from moeproof.optimized.align import align, batch_rows
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.reference.contract import ContractError, expert_map


def expected(slots: Slots, block_m: int) -> tuple[list[int], list[int], list[int]]:
    """(rows in use, blocks in use, counts)."""
    flat = [e for row in local_index(slots.ids, slots.num_experts, slots.expert_map) for e in row]
    rows, blocks, counts = [], [], []
    for expert in range(slots.num_local):
        mine = [s for s, e in enumerate(flat) if e == expert]
        padding = -len(mine) % block_m
        rows += mine + [len(flat)] * padding
        blocks += [expert] * ((len(mine) + padding) // block_m)
        counts.append(len(mine))
    return rows, blocks, counts


@pytest.fixture(params=["one launch", "two launches"], autouse=True)
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few slots by either way."""
    if request.param == "two launches":
        monkeypatch.setattr(align_module.align_small, "SLOTS", 0)


def check(slots: Slots, block_m: int) -> None:
    rows, blocks, counts = expected(slots, block_m)
    got = align(slots, block_m)
    tail, unused = got.sorted_slots.numel() - len(rows), got.block_expert.numel() - len(blocks)

    assert got.sorted_slots.tolist() == rows + [slots.count] * tail
    assert got.block_expert.tolist() == blocks + [-1] * unused
    assert got.num_padded.tolist() == [len(rows)]
    assert got.counts.tolist() == counts
    assert {t.dtype for t in (got.sorted_slots, got.block_expert, got.num_padded, got.counts)} == {torch.int32}


@pytest.mark.parametrize("E", [1, 5, 8, 60, 129])
@pytest.mark.parametrize(("T", "K", "block_m"), [(1, 1, 16), (7, 3, 16), (40, 6, 64), (33, 12, 32), (64, 5, 128)])
def test_sorted_by_expert(T: int, K: int, block_m: int, E: int) -> None:
    check(Slots(random_ids(T + E, T, K, E), E, E), block_m)


@pytest.mark.parametrize("E", [5, 300])
def test_many_chunks(E: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps in each program, more programs than are summed at once, and an expert that gets a third of the slots."""
    monkeypatch.setattr(align_module, "STEP", 8)
    monkeypatch.setattr(align_module, "PROGRAMS", 32)
    ids = random_ids(1, 53, 6, E)
    ids[::3] = 1
    check(Slots(ids, E, E), 64)


def test_all_on_one_expert() -> None:
    for expert in (0, 2, 4):
        check(Slots(torch.full((24, 2), expert, dtype=torch.int32, device=DEVICE), 5, 5), 16)


@pytest.mark.parametrize("counts", [(16, 0, 17, 15), (0, 32, 0, 31), (1, 33, 64, 0)])
def test_counts_around_the_block(counts: tuple[int, ...]) -> None:
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))[:, None]
    check(Slots(ids.flip(0).to(torch.int32).to(DEVICE), 4, 4), 16)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_remote_experts_are_skipped(rank: int, placement: str) -> None:
    mapping = expert_map(10, 3, rank, placement)
    assert mapping is not None
    e = int((mapping >= 0).sum())

    check(Slots(random_ids(2, 21, 4, 10), 10, e, mapping.to(DEVICE)), 16)


def test_strided_ids_and_map() -> None:
    mapping = expert_map(10, 2, 1)
    assert mapping is not None
    check(Slots(strided(random_ids(3, 21, 4, 10), 7), 10, 5, strided(mapping.to(DEVICE), 3)), 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids_out_of_range_are_skipped(dtype: torch.dtype) -> None:
    ids = random_ids(4, 9, 2, 5, dtype)
    ids[0, 0], ids[3, 1], ids[4, 0] = 5, 2**31 - 1, -7
    if dtype == torch.int64:
        ids[5, 0] = 2**32 + 3  # 3, once narrowed
    check(Slots(ids, 5, 5), 16)


def test_nothing_to_sort() -> None:
    check(Slots(torch.full((6, 2), -1, dtype=torch.int32, device=DEVICE), 4, 4), 16)
    check(Slots(torch.zeros(0, 2, dtype=torch.int64, device=DEVICE), 4, 4), 16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_batch_rows(dtype: torch.dtype) -> None:
    """Positions follow slot order; -1 for dead slots and beyond the capacity; counts are not capped."""
    mapping = expert_map(9, 2, 0)
    assert mapping is not None
    slots = Slots(random_ids(5, 70, 4, 9, dtype), 9, 5, mapping.to(DEVICE))
    seen, want = [0] * 5, []
    for row in local_index(slots.ids, 9, mapping):
        for e in row:
            want.append(e * 25 + seen[e] if e >= 0 and seen[e] < 25 else -1)
            seen[e] += e >= 0

    rows, counts = batch_rows(slots, 25)

    assert max(seen) > 25
    assert rows.tolist() == want
    assert counts.tolist() == seen


def test_clear_dead_touches_dead_rows_only() -> None:
    slots = Slots(random_ids(6, 9, 3, 5), 5, 5)
    y = strided(torch.full((27, 40), 3.0, device=DEVICE))
    clear_dead(y, slots)

    want = [0.0 if e < 0 else 3.0 for row in local_index(slots.ids, 5, None) for e in row]
    assert torch.equal(y.cpu(), torch.tensor(want)[:, None].expand(27, 40))


@pytest.mark.parametrize(
    ("ids", "rest", "message"),
    [
        (torch.zeros(4), (3, 3), "dims"),
        (torch.zeros(4, 2), (3, 3), "int32 or torch.int64"),
        (torch.zeros(4, 2, dtype=torch.int32), (3, 2), "no expert_map"),
        (torch.zeros(4, 2, dtype=torch.int32), (3, 2, torch.zeros(3, dtype=torch.int64)), "expert_map is torch.int64"),
        (torch.zeros(4, 2, dtype=torch.int32), (3, 2, torch.zeros(4, dtype=torch.int32)), "expert_map"),
    ],
)
def test_wrong_routing_is_refused(ids: torch.Tensor, rest: tuple, message: str) -> None:
    with pytest.raises(ContractError, match=message):
        Slots(ids, *rest)
