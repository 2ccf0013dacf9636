"""Bad input on one rank: one clear error on every rank, before anything is exchanged, and the next call works."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gloo_ranks import GlooRanks
from rank_kit import PAIRS, every_pair, line_for, on_ranks

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import ContractError, FusedMoEModularKernel, Inputs, Link, RankPair, World
from moeproof.reference.eager.ranks_all_to_all import AllToAll
from moeproof.reference.eager.ranks_exchange import check_splits

Fault = Callable[[RankPair, Inputs, World], tuple[RankPair, Inputs, World]]
GUILTY = 1


def _inputs(**change: Callable[[Inputs], torch.Tensor]) -> Fault:
    return lambda pair, inputs, world: (pair, inputs.map({k: make(inputs) for k, make in change.items()}), world)


def _more_tokens(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    more = {name: torch.cat([t, t, t]) for name, t in inputs.tensors() if name in ("hidden_states", "topk_ids", "topk_weights")}
    return pair, inputs.map(more), world


def _other_hidden(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    narrow = {"hidden_states": inputs.hidden_states[:, :16], "w1": inputs.w1[:, :, :16], "w2": inputs.w2[:, :16]}
    return pair, inputs.map(narrow), world


def _other_dtype(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    half = {name: t.half() for name, t in inputs.tensors() if name in ("hidden_states", "w1", "w2")}
    return pair, inputs.map(half), world


def _other_map(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    assert inputs.expert_map is not None
    return pair, inputs.map({"expert_map": inputs.expert_map.roll(1)}), world


def _other_world(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    other = replace(world, problem=replace(world.problem, placement="round_robin"))
    return pair, replace(inputs, expert_map=other.grid.expert_map(GUILTY)), other


def _failing_experts(pair: RankPair, inputs: Inputs, world: World) -> tuple[RankPair, Inputs, World]:
    def experts(given: Inputs) -> Any:
        made = pair.experts(given)

        def fail(*_: Any, **__: Any) -> torch.Tensor:
            raise RuntimeError("out of registers")

        made.apply = fail  # type: ignore[method-assign]
        return made

    return replace(pair, experts=experts), inputs, world


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "id out of range": (_inputs(topk_ids=lambda i: torch.full_like(i.topk_ids, 99)), r"topk_ids\[0, 0\] = 99", "refused"),
    "float ids": (_inputs(topk_ids=lambda i: i.topk_ids.float()), "must be an integer dtype", "refused"),
    "ids of another dtype": (_inputs(topk_ids=lambda i: i.topk_ids.long()), "ids: rank 0/2 has torch.int32, rank 1", "ids: "),
    "another hidden size": (_other_hidden, "hidden: rank 0/2 has 20, rank 1 has 16", "hidden: "),
    "another dtype": (_other_dtype, "dtype: rank 0/2 has torch.bfloat16, rank 1 has torch.float16", "dtype: "),
    "another expert map": (_other_map, "expert_map is .* the placement gives rank 1 of 3", "refused"),
    "another placement": (_other_world, "placement: rank 0/2 has .*round_robin", "placement: "),
    "experts that raise": (_failing_experts, "out of registers", "RuntimeError in the experts: out of registers"),
}


def refused_then_well(link: Link, name: str, fault: str) -> tuple[str, str, bool]:
    """(kind, text) of the error of a call in which the guilty rank is wrong, and whether the next call is right."""
    case = parse_case(line_for(name, 3, "routing=uniform"))
    good = make_rank_inputs(case, link.rank)
    pair, inputs, world = PAIRS[name], good, case.world
    if link.rank == GUILTY:
        pair, inputs, world = (FAULTS[fault][0] if fault else _more_tokens)(pair, inputs, world)
    kind, text = "", ""
    try:
        run_rank(pair, [inputs], world, link)
    except Exception as error:  # what it is is what the test asks
        kind, text = type(error).__name__, str(error)
    (shown,) = run_rank(PAIRS[name], [good], case.world, link)
    return kind, text, bool(shown["out"].isfinite().all())


def check_answers(answers: list[tuple[str, str, bool]], own: str, others: str) -> None:
    for rank, (kind, text, well) in enumerate(answers):
        assert text, f"rank {rank} did not raise"
        pattern = own if rank == GUILTY else others
        assert kind == "ContractError" or rank == GUILTY, (rank, kind, text)
        assert re.search(pattern, text), (rank, text)
        assert well, f"rank {rank}: the next call went wrong"
        if rank != GUILTY and others == "refused":
            assert text.startswith(f"rank {GUILTY} refused: ") and text.endswith("(nothing was exchanged)")


@every_pair
@pytest.mark.parametrize("fault", FAULTS)
def test_one_wrong_rank_is_told_to_all(name: str, fault: str) -> None:
    _, own, others = FAULTS[fault]

    check_answers(on_ranks(3, lambda link: refused_then_well(link, name, fault)), own, others)


@every_pair
@pytest.mark.parametrize("fault", ["id out of range", "another hidden size", "experts that raise"])
def test_the_same_over_gloo(gloo: GlooRanks, name: str, fault: str) -> None:
    _, own, others = FAULTS[fault]

    check_answers(gloo.results(refused_then_well, 3, name, fault), own, others)


@pytest.mark.parametrize("name", ["eager-alltoall", "eager-batched-alltoall"])
def test_more_tokens_than_the_bound_release_the_others(gloo: GlooRanks, name: str) -> None:
    """Raised on that rank before any collective; the others are told why, at once."""
    answers = gloo.results(refused_then_well, 3, name, "")

    check_answers(answers, "9 tokens on this rank, at most 3 are allowed", "refused")
    assert all("9 tokens on this rank, at most 3 are allowed" in text for _, text, _ in answers)


def wrong_ids_dtype(link: Link) -> tuple[str, str, bool]:
    """An implementation that needs int64 ids gets int32 on the guilty rank: the kernel object refuses before prepare."""
    case = parse_case(line_for("eager-alltoall", 3))
    inputs = make_rank_inputs(case, link.rank)
    pf = AllToAll(link, case.world.grid, ids_dtype=torch.int64)
    kernel = FusedMoEModularKernel(pf, PAIRS["eager-alltoall"].experts(inputs))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        x, w1, w2, mapping = inputs.hidden_states, inputs.w1, inputs.w2, inputs.expert_map
        return kernel(x, w1, w2, inputs.topk_weights, ids, global_num_experts=7, expert_map=mapping)

    kind, text = "", ""
    try:
        forward(inputs.topk_ids if link.rank == GUILTY else inputs.topk_ids.long())
    except ContractError as error:
        kind, text = type(error).__name__, str(error)
    return kind, text, bool(forward(inputs.topk_ids.long()).isfinite().all())


def test_a_wrong_ids_dtype_on_one_rank() -> None:
    check_answers(on_ranks(3, wrong_ids_dtype), "topk_ids is torch.int32, this prepare/finalize needs torch.int64", "refused")


@every_pair
def test_a_placement_for_another_world_size(name: str) -> None:
    case = parse_case(line_for(name, 3))

    def body(link: Link) -> str:
        with pytest.raises(ContractError) as raised:
            run_rank(PAIRS[name], [make_rank_inputs(case, link.rank)], case.world, link)
        return str(raised.value)

    assert all("the placement is for 3 ranks, the group has 2" in text for text in on_ranks(2, body))


def test_capacity_is_refused_on_every_rank_and_never_cut_off() -> None:
    name = "eager-batched-alltoall"
    case = parse_case(line_for(name, 3, "routing=hot,capacity=8"))

    def body(link: Link) -> str:
        with pytest.raises(ContractError) as raised:
            run_rank(PAIRS[name], [make_rank_inputs(case, link.rank)], case.world, link)
        return str(raised.value)

    texts = on_ranks(3, body)

    assert len(set(texts)) == 1
    assert "gets 9 rows ([3, 3, 3] by rank), its region of the batched layout holds 8; nothing was sent" in texts[0]


def lying_splits(link: Link) -> str:
    send = [2] * link.size
    receive = [3 if link.rank == 0 and source == 2 else 2 for source in range(link.size)]
    with pytest.raises(ContractError) as raised:
        check_splits(link, send, receive)
    return str(raised.value)


def test_splits_that_do_not_match_are_named(gloo: GlooRanks) -> None:
    texts = gloo.results(lying_splits, 3)

    words = "rank 2 sends 2 rows to rank 0, which expects 3; 1 pairs differ"
    assert set(texts) == {f"the ranks do not agree on splits, nothing was exchanged: {words}"}


class ShortSender:
    """A link whose rank 1 sends one row fewer than it declared, in the `at`-th exchange of rows."""

    def __init__(self, link: Link, at: int = 0) -> None:
        self.link, self.at, self.seen = link, at, 0
        self.rank, self.size, self.device, self.group = link.rank, link.size, link.device, link.group

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.link.all_gather(x)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        return self.link.reduce_scatter(x)

    def all_to_all(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> Any:
        if self.rank == GUILTY and self.seen == self.at:
            target = max((r for r in range(self.size) if r != self.rank), key=lambda r: send[r])
            first = sum(send[:target])
            rows = torch.cat([rows[: first + send[target] - 1], rows[first + send[target] :]])
            send = [n - (r == target) for r, n in enumerate(send)]
        self.seen += 1
        return self.link.all_to_all(rows, send, receive)


def short(link: Link, name: str, at: int) -> tuple[str, str]:
    case = parse_case(line_for(name, 3, "routing=uniform"))
    try:
        run_rank(PAIRS[name], [make_rank_inputs(case, link.rank)], case.world, ShortSender(link, at))
    except ContractError as error:
        return "raised", str(error)
    return "returned", ""


@pytest.mark.parametrize("name", ["eager-alltoall", "eager-batched-alltoall"])
@pytest.mark.parametrize("at", [0, 1])
def test_rows_that_were_declared_and_not_sent_are_missed(unrecorded_gloo: GlooRanks, name: str, at: int) -> None:
    """gloo itself says nothing about a short send: the seal of the row that stayed away does."""
    for answers in (unrecorded_gloo.results(short, 3, name, at), on_ranks(3, lambda link: short(link, name, at))):
        raised = [text for kind, text in answers if kind == "raised"]

        assert raised and any("1 of" in text and "did not arrive as sent" in text for text in raised), answers
