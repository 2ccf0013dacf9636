"""Rows as sealed bytes, quantised payloads, links: what lies between a tensor and the wire."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gloo_ranks import GlooRanks
from rank_kit import line_for, on_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs, make_world_inputs
from moeproof.harness.ranks import wire
from moeproof.reference.contract import SCHEMES, Link
from moeproof.reference.contract.agreement import agree, withdraw
from moeproof.reference.eager.ranks_all_gather import AllGatherReduceScatter
from moeproof.reference.eager.ranks_all_to_all import AllToAll
from moeproof.reference.eager.ranks_batched import BatchedAllToAll
from moeproof.reference.eager.ranks_link import alone, on_threads, poisoned
from moeproof.reference.eager.ranks_message import Field, fields_of, pack, unpack

Tensor = torch.Tensor
FP8 = torch.float8_e4m3fn
DTYPES = [torch.bfloat16, torch.float16, torch.float32, FP8, torch.float8_e8m0fnu, torch.int32, torch.int64, torch.uint8]


def _columns(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    bytes_of = [torch.randint(0, 256, (rows, 3 * d.itemsize), generator=generator, dtype=torch.uint8) for d in DTYPES]
    return [b.view(d) for b, d in zip(bytes_of, DTYPES, strict=True)] + [torch.arange(rows)]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_what_is_packed_comes_out(rows: int) -> None:
    """Every dtype, NaN bits and all."""
    columns = _columns(rows)
    out, sealed = unpack(pack(columns), fields_of(columns))

    assert bool(sealed.all()) and sealed.shape == (rows,)
    for a, b in zip(columns, out, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_the_seal_breaks() -> None:
    """For a row that never came (0xFF or zeros), came in part, has one field of another row, or two bytes exchanged."""
    columns = _columns(6)
    message = pack(columns)
    broken = message.clone()
    broken[0] = 0xFF
    broken[1] = 0
    broken[2, -20:] = 0xFF
    broken[3, :12] = message[4, :12]
    broken[4, :2] = message[4, :2].flip(0)
    _, sealed = unpack(broken, fields_of(columns))

    assert sealed.tolist() == [False] * 5 + [True]


def test_any_one_changed_byte_breaks_the_seal() -> None:
    message = pack([torch.arange(40, dtype=torch.uint8)[None], torch.zeros(1, 3, dtype=torch.bfloat16)])
    changed = message.repeat(message.size(1), 1)
    changed[torch.arange(len(changed)), torch.arange(len(changed))] ^= 1
    _, sealed = unpack(changed, [Field((40,), torch.uint8), Field((3,), torch.bfloat16)])

    assert not bool(sealed.any())


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in bytes."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.most = max(self.most, out.numel() * out.element_size())
        return out


def test_a_seal_takes_no_more_memory_than_its_rows() -> None:
    columns = [torch.zeros(64, 7168, dtype=torch.bfloat16), torch.zeros(64, 8)]
    rows = sum(c.numel() * c.element_size() for c in columns)
    with Largest() as making:
        message = pack(columns)
    with Largest() as reading:
        unpack(message, fields_of(columns))

    assert making.most <= 1.01 * rows and reading.most <= 1.01 * rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, FP8, torch.int32])
def test_poison_is_nan_or_minus_one(dtype: torch.dtype) -> None:
    x = poisoned((2, 3), torch.empty(0, dtype=dtype))

    assert x.shape == (2, 3) and x.dtype == dtype
    assert bool(x.float().isnan().all()) if dtype.is_floating_point else bool((x == -1).all())


def quantised(link: Link, kind: str) -> list[tuple[float, bool]]:
    """Dispatch of fp8 rows: each arrived row times its own scale, and whether it is some token's row, up to the scale's
    rounding."""
    case = parse_case(line_for("eager-alltoall", 3, "routing=uniform,spread=uneven"))
    grid = case.world.grid
    every = [
        (i.hidden_states.float() * (1 + rank)).sign() * 2.0**rank * (1 + torch.arange(i.problem.T))[:, None]
        for rank, i in enumerate(make_world_inputs(case))
    ]
    inputs = make_rank_inputs(case, link.rank)
    made = {
        "all-gather": lambda: AllGatherReduceScatter(link, grid, scheme=SCHEMES["fp8_token"]),
        "all-to-all": lambda: AllToAll(link, grid, scheme=SCHEMES["fp8_token"]),
        "batched": lambda: BatchedAllToAll(link, grid, 27, 9, scheme=SCHEMES["fp8_token"]),
    }[kind]()
    a1 = every[link.rank].to(torch.bfloat16)
    mapping, weights = inputs.expert_map, inputs.topk_weights
    rows, scales, counts, _, _ = made.prepare(a1, None, None, weights, inputs.topk_ids, grid.experts, mapping, False)
    assert rows.dtype == FP8 and scales is not None and counts is not None
    if kind == "batched":
        assert bool(scales[0, int(counts[0]) :].isnan().all()), "scales of rows that do not exist are poisoned"
        rows = torch.cat([region[:n] for region, n in zip(rows.float(), counts.tolist(), strict=True)])
        scales = torch.cat([region[:n] for region, n in zip(scales, counts.tolist(), strict=True)])
    known = torch.cat(every)
    answers = []
    for row, scale in zip(rows.float(), scales, strict=True):
        value = (row * scale).to(torch.bfloat16).float()
        answers.append((float(value.abs().max()), bool((known == value).all(dim=1).any()) or not bool(value.any())))
    return answers


@pytest.mark.parametrize("kind", ["all-gather", "all-to-all", "batched"])
def test_scales_travel_with_their_fp8_rows(gloo: GlooRanks, kind: str) -> None:
    """P24: every rank's rows have magnitudes of their own, so a scale left behind gives another row."""
    for answers in (gloo.results(quantised, 3, kind), on_ranks(3, lambda link: quantised(link, kind))):
        assert all(right for rank in answers for _, right in rank)
        assert len({magnitude for rank in answers for magnitude, _ in rank}) > 5


def test_agreement_costs_one_collective_and_says_who_differs() -> None:
    def body(link: Link) -> str:
        agree(link, {"hidden": 4}, None)
        try:
            agree(link, {"hidden": 4 if link.rank else 8, "slots": 2}, None)
        except ValueError as error:
            return str(error)
        return ""

    words = "the ranks do not agree, nothing was exchanged: hidden: rank 0 has 8, rank 1/2 has 4"
    assert on_ranks(3, body) == [words] * 3


def test_a_long_reason_is_cut_and_not_lost() -> None:
    def body(link: Link) -> str:
        if link.rank == 0:
            withdraw(link, "x" * 5000)
            return ""
        with pytest.raises(ValueError, match="rank 0 refused: xxx") as raised:
            agree(link, {}, None)
        return str(raised.value)

    assert 900 < len(on_ranks(2, body)[1]) < 1100


def test_facts_that_differ_only_behind_the_cut_still_differ() -> None:
    def body(link: Link) -> None:
        with pytest.raises(ValueError, match="do not agree"):
            agree(link, {"facts": "y" * 2000 + str(link.rank)}, None)

    on_ranks(2, body)


def test_threads_release_each_other() -> None:
    def body(link: Link) -> Tensor:
        if link.rank == 2:
            raise RuntimeError("gone")
        return link.all_gather(torch.ones(1))

    results = on_threads(3, body, timeout=5)

    assert [type(r).__name__ for r in results] == ["BrokenBarrierError", "BrokenBarrierError", "RuntimeError"]


def test_a_world_of_one_needs_nobody() -> None:
    link = alone()

    assert link.all_gather(torch.arange(3)).tolist() == [[0, 1, 2]]
    assert link.all_to_all(torch.arange(3), [3], [3])().tolist() == [0, 1, 2]
    assert link.reduce_scatter(torch.ones(1, 4)).tolist() == [1.0] * 4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), ()])
def test_every_dtype_travels_between_pool_and_ranks(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = torch.arange(120, dtype=torch.uint8)[: torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)
    got = wire.loads(wire.dumps({"rows": [sent]}))["rows"][0]

    assert (got.dtype, got.shape) == (dtype, sent.shape)
    assert torch.equal(got.reshape(-1).view(torch.uint8), sent.reshape(-1).view(torch.uint8))
