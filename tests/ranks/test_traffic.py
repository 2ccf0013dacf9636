"""What travels: the same collectives on every rank, sizes that depend on what they may depend on, no token twice."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from gloo_ranks import GlooRanks
from rank_kit import PAIRS, every_pair, line_for, on_ranks

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_world_inputs
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import Link
from moeproof.reference.ranks import sent_tokens

Entry = tuple[str, tuple[int, ...], tuple[int, ...]]


class Recording:
    """A link that writes down every collective: name, shape of what is given, rows sent to each rank."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.entries: list[Entry] = []

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._link, name)
        if not callable(value):
            return value

        def call(x: torch.Tensor, *splits: Any) -> Any:
            self.entries.append((name, tuple(x.shape), tuple(splits[0]) if splits else ()))
            return value(x, *splits)

        return call


def traffic(name: str, line: str) -> list[list[Entry]]:
    case = parse_case(line)
    inputs = make_world_inputs(case)

    def body(link: Link) -> list[Entry]:
        recording = Recording(link)
        run_rank(PAIRS[name], [inputs[link.rank]], case.world, recording)
        return recording.entries

    return on_ranks(case.ranks, body)


@every_pair
@pytest.mark.parametrize("extra", ["routing=uniform", "routing=none", "spread=one", "spread=empty,routing=hot", "T=0"])
def test_every_rank_makes_the_same_collectives_in_the_same_order(name: str, extra: str) -> None:
    """Also one that has no token, or whose experts get none: P78, P79, P80."""
    names = [[entry[0] for entry in rank] for rank in traffic(name, line_for(name, 3, extra))]

    assert names[0] and names == [names[0]] * 3


def test_batched_messages_depend_on_the_placement_only() -> None:
    """Graph capture needs sizes that no routing changes."""
    name = "eager-batched-alltoall"
    lines = [line_for(name, 3, f"routing={routing},spread=even") for routing in ("uniform", "hot", "dup", "none", "minus1")]

    first, *others = (traffic(name, line) for line in lines)

    assert all(other == first for other in others)


@pytest.mark.parametrize("routing", ["uniform", "hot", "dup", "minus1"])
@pytest.mark.parametrize("extra", ["ranks=3", "ranks=4,tp=2,sp=1"])
def test_a_token_travels_once_to_each_rank_that_needs_it(routing: str, extra: str) -> None:
    """With three slots of seven experts on few ranks most tokens have two experts on one rank."""
    name = "eager-alltoall"
    line = line_for(name, 3, f"routing={routing},spread=uneven", extra)
    case = parse_case(line)
    inputs = make_world_inputs(case)
    want = sent_tokens(case.world, inputs)
    pairs = sum(int((i.topk_ids >= 0).sum()) for i in inputs) * case.tp
    for rank, entries in enumerate(traffic(name, line)):
        dispatch, combine = (entry for entry in entries if entry[0] == "all_to_all")
        assert list(dispatch[2]) == want[rank].tolist()
        assert list(combine[2]) == want[:, rank].tolist()

    assert int(want.sum()) < pairs


def test_one_exchange_of_counts_and_one_of_rows() -> None:
    for entries in traffic("eager-alltoall", line_for("eager-alltoall", 3)):
        assert [entry[0] for entry in entries] == ["all_gather", "all_gather", "all_to_all", "all_gather", "all_to_all"]
        assert [entry[1] for entry in entries if entry[0] == "all_gather"] == [(1024,), (3,), (1024,)]


class Weighing:
    """A link that counts the bytes it is handed: what every rank gives to a collective, by the rows of its splits."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self.bytes: Counter[str] = Counter()

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._link, name)
        if not callable(value):
            return value

        def call(x: torch.Tensor, *splits: Any) -> Any:
            self.bytes[name] += x.numel() * x.element_size()
            return value(x, *splits)

        return call


def dispatched_bytes(link: Link, name: str, line: str) -> int:
    """Bytes that this rank's prepare gives to collectives: counts, ids, weights, seals and agreement included."""
    world = parse_case(line).world
    p, grid, weighing = world.problem, world.grid, Weighing(link)
    draw = torch.Generator().manual_seed(link.rank)
    tokens = world.tokens[link.rank]
    x = torch.randn(tokens, p.H, generator=draw).to(p.fmt.dtype)
    ids = torch.rand(tokens, p.E, generator=draw).argsort(dim=1)[:, : p.K].to(torch.int32)
    weights = torch.rand(tokens, p.K, generator=draw)
    prepare_finalize = PAIRS[name].prepare_finalize(Mock(), world, weighing)
    prepare_finalize.prepare(x, None, None, weights, ids, grid.experts, grid.expert_map(link.rank), False)
    return sum(weighing.bytes.values())


MOST = {"fp8_block": 0.55, "fp8_token": 0.55, "int8_token": 0.55, "mxfp8": 0.55, "mxfp4_w4a4": 0.3}
"""Codes against bf16, by bytes: half, or a quarter, and the scales of each 128 or 32 of them."""


def _lines(name: str, scheme: str) -> list[str]:
    sizes = "T=64,H=7168,I=128,E=16,K=8"
    return [line_for(name, 2, "values=normal", sizes=f"{sizes}{more}") for more in ("", f",scheme={scheme}")]


@pytest.mark.parametrize("name", ["eager-allgather", "eager-alltoall", "eager-batched-alltoall"])
@pytest.mark.parametrize("scheme", MOST)
def test_codes_move_about_half_of_the_bytes_of_bf16(name: str, scheme: str) -> None:
    """Hidden 7168, k = 8, 32 tokens a rank: everything that prepare gives to a collective."""
    plain, codes = (on_ranks(2, lambda link, line=line: dispatched_bytes(link, name, line)) for line in _lines(name, scheme))
    for bf16, narrow in zip(plain, codes, strict=True):
        assert bf16 > 32 * 7168 * 2
        assert narrow <= MOST[scheme] * bf16


def test_the_same_over_gloo(gloo: GlooRanks) -> None:
    name = "eager-alltoall"
    plain, codes = (gloo.results(dispatched_bytes, 2, name, line) for line in _lines(name, "fp8_block"))

    assert all(narrow <= 0.55 * bf16 for bf16, narrow in zip(plain, codes, strict=True))
