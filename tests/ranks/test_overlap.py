"""Prepare and finalize in halves: two micro-batches at once, and a calling order that is checked on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gloo_ranks import GlooRanks
from rank_kit import PAIRS, line_for, on_ranks

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks.checks import check_same_bits
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import ContractError, Inputs, Link
from moeproof.reference.contract.overlap import Batch
from moeproof.reference.eager.ranks_all_to_all import AllToAll

LINE = line_for("eager-alltoall", 3, "values=normal,routing=uniform")


class Calls:
    """The four calls of one rank, with y = the arrived rows in every slot."""

    def __init__(self, link: Link, line: str = LINE) -> None:
        self.inputs: Inputs = make_rank_inputs(parse_case(line), link.rank)
        self.pf = AllToAll(link, parse_case(line).world.grid)
        self.rows: dict[str, Any] = {}
        self.outputs: dict[str, torch.Tensor] = {}

    def start_prepare(self, scale: float = 1.0) -> Batch:
        i = self.inputs
        return self.pf.start_prepare(
            i.hidden_states * scale, None, None, i.topk_weights, i.topk_ids, i.problem.weight_experts, i.expert_map, False
        )

    def finish_prepare(self, batch: Batch) -> None:
        self.rows[batch.name] = self.pf.finish_prepare(batch)

    def start_finalize(self, batch: Batch) -> None:
        rows, _, _, ids, weights = self.rows[batch.name]
        y = rows[:, None].expand(*ids.shape, rows.size(1)).contiguous()
        self.outputs[batch.name] = torch.full_like(self.inputs.hidden_states, torch.nan)
        self.pf.start_finalize(batch, self.outputs[batch.name], y, weights, ids, False)

    def finish_finalize(self, batch: Batch) -> torch.Tensor:
        self.pf.finish_finalize(batch)
        return self.outputs[batch.name]

    def alone(self, scale: float) -> torch.Tensor:
        batch = self.start_prepare(scale)
        self.finish_prepare(batch)
        self.start_finalize(batch)
        return self.finish_finalize(batch)


ORDERS = {
    "one inside the other": "a.sp b.sp b.fp b.sf b.ff a.fp a.sf a.ff",
    "in step": "a.sp b.sp a.fp b.fp a.sf b.sf a.ff b.ff",
    "overlapped": "a.sp b.sp a.fp a.sf b.fp b.sf a.ff b.ff",
    "one after the other": "a.sp a.fp a.sf a.ff b.sp b.fp b.sf b.ff",
}


def interleaved(link: Link, order: str) -> bool:
    """Both micro-batches end with what each gives alone, in whatever legal order."""
    calls = Calls(link)
    want = {"a": calls.alone(1.0), "b": calls.alone(-2.0)}
    steps: dict[str, Callable[[Batch], Any]] = {
        "fp": calls.finish_prepare,
        "sf": calls.start_finalize,
        "ff": calls.finish_finalize,
    }
    batches: dict[str, Batch] = {}
    got: dict[str, Any] = {}
    for name, step in (call.split(".") for call in order.split()):
        if step == "sp":
            batches[name] = calls.start_prepare({"a": 1.0, "b": -2.0}[name])
        else:
            got[name] = steps[step](batches[name])
    return all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("order", ORDERS)
def test_every_legal_order_gives_what_each_gives_alone(gloo: GlooRanks, order: str) -> None:
    assert gloo.results(interleaved, 3, ORDERS[order]) == [True] * 3
    assert on_ranks(3, lambda link: interleaved(link, ORDERS[order])) == [True] * 3


def _third(calls: Calls) -> None:
    for _ in range(3):
        calls.start_prepare()


def _finalize_first(calls: Calls) -> None:
    batch = calls.start_prepare()
    calls.rows[batch.name] = (calls.inputs.hidden_states, None, None, calls.inputs.topk_ids, calls.inputs.topk_weights)
    calls.start_finalize(batch)


def _finish_twice(calls: Calls) -> None:
    batch = calls.start_prepare()
    calls.finish_prepare(batch)
    calls.finish_prepare(batch)


def _finished(calls: Calls) -> None:
    batch = calls.start_prepare()
    calls.finish_prepare(batch)
    calls.start_finalize(batch)
    calls.finish_finalize(batch)
    calls.finish_finalize(batch)


def _strangers(calls: Calls) -> None:
    calls.finish_prepare(Batch("of another layer"))


def _no_prepare(calls: Calls) -> None:
    i = calls.inputs
    calls.pf.finalize(torch.empty_like(i.hidden_states), i.hidden_states, i.topk_weights, i.topk_ids, False)


WRONG: dict[str, tuple[Callable[[Calls], None], str]] = {
    "three at once": (_third, "2 micro-batches are in flight, at most 2; finish one first"),
    "finalize before prepare is finished": (
        _finalize_first,
        "start_finalize of micro-batch 1 after its start_prepare; the order",
    ),
    "prepare finished twice": (_finish_twice, "finish_prepare of micro-batch 1 after its finish_prepare; the order"),
    "a micro-batch that is finished": (_finished, "finish_finalize of micro-batch 1, which is finished"),
    "a micro-batch of another instance": (_strangers, "of another layer, which is finished or was started elsewhere"),
    "finalize without prepare": (_no_prepare, "finalize without a prepare before it"),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_order_is_refused(mistake: str) -> None:
    act, words = WRONG[mistake]

    def body(link: Link) -> str:
        with pytest.raises(ContractError) as raised:
            act(Calls(link))
        return str(raised.value)

    assert all(words in text for text in on_ranks(3, body))


def one_out_of_order(link: Link) -> str:
    """Rank 1 finishes a prepare twice; the others go on to finalize, where they would wait for it."""
    calls = Calls(link)
    batch = calls.start_prepare()
    calls.finish_prepare(batch)
    try:
        if link.rank == 1:
            calls.finish_prepare(batch)
        calls.start_finalize(batch)
    except ContractError as error:
        return str(error)
    return ""


def test_a_wrong_order_on_one_rank_is_told_to_all(gloo: GlooRanks) -> None:
    texts = gloo.results(one_out_of_order, 3)

    assert texts[1].startswith("finish_prepare of micro-batch 1 after its finish_prepare")
    assert texts[0] == texts[2] == f"rank 1 refused: {texts[1]} (nothing was exchanged)"


def different_order(link: Link) -> str:
    """Rank 2 finalizes the second micro-batch where the others finalize the first."""
    calls = Calls(link)
    batches = [calls.start_prepare(), calls.start_prepare(2.0)]
    for batch in batches:
        calls.finish_prepare(batch)
    with pytest.raises(ContractError) as raised:
        calls.start_finalize(batches[link.rank == 2])
    return str(raised.value)


def test_ranks_that_finalize_different_micro_batches_are_told(gloo: GlooRanks) -> None:
    texts = gloo.results(different_order, 3)

    assert len(set(texts)) == 1
    assert (
        "rank 0/1 has AllToAll.start_finalize of micro-batch 1, rank 2 has AllToAll.start_finalize of micro-batch 2" in texts[0]
    )


@pytest.mark.parametrize("spread", ["even", "uneven", "empty", "one"])
def test_the_overlapped_kernel_gives_the_bits_of_the_plain_one(spread: str) -> None:
    case = parse_case(line_for("eager-alltoall", 3, f"values=normal,routing=minus1,spread={spread}"))

    def body(link: Link) -> list[torch.Tensor]:
        inputs = make_rank_inputs(case, link.rank)
        pairs = (PAIRS["eager-alltoall"], PAIRS["eager-alltoall-overlapped"])
        return [run_rank(pair, [inputs], case.world, link)[0]["out"] for pair in pairs]

    plain, overlapped = zip(*on_ranks(3, body), strict=True)

    assert not check_same_bits("out", overlapped, plain, "the plain kernel")
