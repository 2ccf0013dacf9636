"""GEMM1 and GEMM2: both layouts, all storages, ragged in every dimension, every tile path, poisoned surroundings."""

from __future__ import annotations

import pytest
import torch
from plain_layer import DEVICE, DTYPES, check_close, local_index, normal, products, random_ids, strided

from moeproof.optimized import tiles
from moeproof.optimized.align import align
from moeproof.optimized.grouped_gemm import batched_gemm, grouped_gemm
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import Tile, gemm_tile, rows_per_block
from moeproof.reference.contract import ContractError, expert_map

Tensor = torch.Tensor


def stored(w: Tensor, storage: str) -> Tensor:
    """(e, N, K) contiguous, as a transposed view of (e, K, N), or as a view in which no elements are neighbours."""
    if storage == "strided":
        return strided(w)
    return w if storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)


def check_grouped(
    slots: Slots, N: int, K: int, dtype: torch.dtype = torch.float32, storage: str = "NK", bias: bool = False, block_m: int = 16
) -> None:
    """Both products of a layer: the first gathers token rows, the second slot rows. Dead rows keep their poison."""
    (T, slots_per_token), e = slots.ids.shape, slots.num_local
    local = local_index(slots.ids, slots.num_experts, slots.expert_map)
    w = stored(normal(2, e, N, K, dtype=dtype, scale=K**-0.5), storage)
    b = normal(3, e, N, dtype=dtype) if bias else None
    alignment = align(slots, block_m)
    for per_row in (slots_per_token, 1):
        a = normal(1, slots.count // per_row, K, dtype=dtype)
        out = torch.full((slots.count, N), 7.0, dtype=dtype, device=DEVICE)
        grouped_gemm(strided(a) if storage == "strided" else a, w, out, alignment, per_row, b)
        rows = (
            a[:, None].expand(T, slots_per_token, K) if per_row > 1 or slots_per_token == 1 else a.view(T, slots_per_token, K)
        )
        want, magnitude = products(rows, w, local, b)
        live = torch.tensor(local, device=DEVICE).flatten() >= 0

        assert bool((out[~live] == 7).all())
        check_close(out[live], want.flatten(0, 1)[live], magnitude.flatten(0, 1)[live])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["NK", "KN", "strided"])
def test_dtypes_and_storages(dtype: torch.dtype, storage: str) -> None:
    check_grouped(Slots(random_ids(1, 19, 3, 5), 5, 5), 40, 72, dtype, storage, bias=True)


@pytest.mark.parametrize(("T", "K", "E"), [(17, 1, 1), (17, 4, 8), (5, 12, 60), (9, 3, 5)])
def test_experts_and_slots(T: int, K: int, E: int) -> None:
    check_grouped(Slots(random_ids(2, T, K, E, torch.int64), E, E), 33, 31)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (16, 16), (17, 300), (257, 15), (300, 257), (100, 104)])
def test_ragged_sizes(N: int, K: int) -> None:
    check_grouped(Slots(random_ids(3, 9, 2, 3), 3, 3), N, K, torch.float16)


@pytest.mark.parametrize("T", [1, 15, 16, 17, 31, 32, 33, 63, 64])
def test_token_counts(T: int) -> None:
    check_grouped(Slots(random_ids(4, T, 2, 3), 3, 3), 24, 20, block_m=rows_per_block(T * 2, 3))


@pytest.mark.parametrize("tile", [Tile(16, 16, 32, 3), Tile(32, 32, 16, 8), Tile(64, 16, 64, 2), Tile(128, 64, 32, 1)])
def test_every_tile_path(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many blocks in both directions, ragged ends, groups of rows that do not divide: whatever a table may ever select."""
    monkeypatch.setattr(tiles, "table", lambda dtype: dict.fromkeys((16, 32, 64, 128), tile))
    check_grouped(Slots(random_ids(5, 45, 2, 2), 2, 2), 40, 70, bias=True, block_m=tile.block_m)
    check_batched((0, 45, 33), 45, 40, 70, torch.float32, bias=True)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_remote_experts(placement: str) -> None:
    mapping = expert_map(10, 3, 2, placement)
    assert mapping is not None
    check_grouped(Slots(random_ids(6, 21, 4, 10), 10, 3, mapping.to(DEVICE)), 24, 40)


def test_empty_experts_and_empty_calls() -> None:
    only = torch.full((9, 2), 3, dtype=torch.int32, device=DEVICE)
    check_grouped(Slots(only, 5, 5), 24, 20)
    check_grouped(Slots(torch.full_like(only, -1), 5, 5), 24, 20)
    check_grouped(Slots(only[:0], 5, 5), 24, 20)


def check_batched(
    counts: tuple[int, ...], C: int, N: int, K: int, dtype: torch.dtype, storage: str = "NK", bias: bool = False
) -> None:
    e = len(counts)
    live = torch.arange(C) < torch.tensor(counts)[:, None]
    a = normal(1, e, C, K, dtype=dtype)
    a[~live] = float("nan")
    w = stored(normal(2, e, N, K, dtype=dtype, scale=K**-0.5), storage)
    b = normal(3, e, N, dtype=dtype) if bias else None
    out = torch.full((e, C, N), 7.0, dtype=dtype, device=DEVICE)
    given = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    batched_gemm(strided(a) if storage == "strided" else a, w, out, given, b)
    want, magnitude = products(a, w, [[x if alive else -1 for alive in row] for x, row in enumerate(live.tolist())], b)

    assert bool((out[~live] == 7).all())
    check_close(out[live], want[live], magnitude[live])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["NK", "KN", "strided"])
def test_batched(dtype: torch.dtype, storage: str) -> None:
    check_batched((0, 20, 1, 7, 0), 20, 40, 72, dtype, storage, bias=True)


@pytest.mark.parametrize(("C", "N", "K"), [(1, 17, 100), (33, 1, 20), (70, 50, 257)])
def test_batched_ragged(C: int, N: int, K: int) -> None:
    check_batched((C, 0, min(C, 17)), C, N, K, torch.float16)


def test_float32_result_of_16_bit_rows() -> None:
    """The output's own dtype is the only rounding."""
    a, w = normal(1, 1, 9, 40, dtype=torch.bfloat16), normal(2, 1, 24, 40, dtype=torch.bfloat16)
    out = torch.empty(1, 9, 24, device=DEVICE)
    batched_gemm(a, w, out, torch.full((1,), 9, dtype=torch.int32, device=DEVICE))
    want, magnitude = products(a, w, [[0] * 9])

    check_close(out, want, magnitude)


@pytest.mark.parametrize("operand", ["a", "w", "out"])
def test_offsets_beyond_32_bits(operand: str) -> None:
    """Rows of one operand further apart than 2^31 elements, in memory that is mostly never touched."""
    far = 2**31 + 64

    def spread(name: str, x: Tensor) -> Tensor:
        if name != operand:
            return x
        strides = (far, *x.stride()[1:])
        return torch.empty(far + x[0].numel(), dtype=x.dtype, device=DEVICE).as_strided(x.shape, strides).copy_(x)

    a, w, out = normal(1, 2, 32, dtype=torch.float16), normal(2, 2, 24, 32, dtype=torch.float16), normal(3, 2, 24)
    slots = Slots(torch.tensor([[1], [0]], dtype=torch.int32, device=DEVICE), 2, 2)
    got = spread("out", out)
    grouped_gemm(spread("a", a), spread("w", w), got, align(slots, 16), 1)
    want, magnitude = products(a[:, None], w, [[1], [0]])

    check_close(got.contiguous(), want[:, 0], magnitude[:, 0])


def test_tiles_fit() -> None:
    """Powers of two of at least 16, no wider than the padded matrix, for every block_m that rows_per_block returns."""
    for rows in (0, 1, 24, 25, 100, 10_000):
        block_m = rows_per_block(rows, 1)
        for N, K in ((1, 1), (50, 1407), (4096, 7168)):
            for dtype in DTYPES:
                t = gemm_tile(block_m, N, K, dtype)
                assert all(v >= 16 and v & (v - 1) == 0 for v in (t.block_m, t.block_n, t.block_k))
                assert t.block_n < 2 * max(N, 16)


def test_refusals() -> None:
    a, w, out = torch.zeros(4, 8), torch.zeros(2, 6, 8), torch.zeros(4, 6)
    slots = Slots(torch.zeros(4, 1, dtype=torch.int32), 2, 2)
    with pytest.raises(ContractError, match="columns"):
        grouped_gemm(a[:, :7], w, out, align(slots, 16), 1)
    with pytest.raises(ContractError, match="must be equal"):
        grouped_gemm(a.half(), w, out, align(slots, 16), 1)
    with pytest.raises(ContractError, match="bias is"):
        grouped_gemm(a, w, out, align(slots, 16), 1, torch.zeros(2, 8))
    with pytest.raises(ContractError, match="allowed"):
        grouped_gemm(a.double(), w.double(), out, align(slots, 16), 1)
    with pytest.raises(ContractError, match="expert_num_tokens"):
        batched_gemm(a[None].expand(2, 4, 8), w, torch.zeros(2, 4, 6), torch.zeros(2, dtype=torch.int64))
