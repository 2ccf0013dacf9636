"""Planted faults of dispatch and combine on ranks: each is found, in the right stage, with the right rank named.

Names are those of docs/faults.md. A fault is a change of what correct ranks show, or of how one of their parts behaves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_kit import PAIRS, Shown, every_showing, expectation, line_for, on_ranks, simulate

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.worlds import make_world_inputs, whole_case
from moeproof.harness.ranks.checks import WorldExpectation, check_conservation, fitting_capacity, judge_world
from moeproof.harness.ranks.pairs import PREPARED, run_rank
from moeproof.harness.ranks.tags import check_identity, tagged
from moeproof.harness.verdict import Finding
from moeproof.reference.contract import Claims, Inputs, Link, RankPair, World
from moeproof.reference.eager import ranks_all_gather, ranks_common
from moeproof.reference.eager.layer import run

Tensor = torch.Tensor
RANKS = 3


def judged(line: str, name: str, shown: list[Shown]) -> list[Finding]:
    return [f for result in judge_world(expectation(line, name), shown).values() for f in result.findings]


def with_fault(name: str, line: str, method: str, wrap: Callable[[Callable[..., Any], int], Callable[..., Any]]) -> list[Shown]:
    """What the ranks show when one method of prepare/finalize is wrapped: wrap(right method, rank)."""
    right = PAIRS[name].prepare_finalize

    def wrong(inputs: Inputs, world: World, link: Link) -> Any:
        pf = right(inputs, world, link)
        setattr(pf, method, wrap(getattr(pf, method), link.rank))
        return pf

    (shown,) = simulate(replace(PAIRS[name], prepare_finalize=wrong), parse_case(line))
    return shown


def tampered(shown: Shown, change: Callable[[list[Any]], None]) -> Shown:
    """The same with what prepare returned changed: rows, scales, counts, ids, weights."""
    result = [shown[name].clone() if name in shown else None for name in PREPARED]
    change(result)
    return shown | {name: t for name, t in zip(PREPARED, result, strict=True) if t is not None}


def _live(result: list[Any]) -> tuple[int, int]:
    row, column = (result[3] >= 0).nonzero()[0].tolist()
    return row, column


def _lose_slot(result: list[Any]) -> None:
    result[3][_live(result)] = -1


def _wrong_expert(result: list[Any]) -> None:
    here = result[3][result[3] >= 0].unique()
    row, column = _live(result)
    result[3][row, column] = next(int(e) for e in here if int(e) != int(result[3][row, column]))


def _stale_weight(result: list[Any]) -> None:
    result[4][_live(result)] = 0


def _swap_rows(result: list[Any]) -> None:
    rows = result[0]
    result[0] = rows.flip(0) if rows.dim() == 2 else rows.roll(1, 1)


def _torn_row(result: list[Any]) -> None:
    row, _ = _live(result)
    result[0][row, -8:] = result[0][row - 1, -8:]


def _tail_ids(result: list[Any]) -> None:
    """Old ids behind the received rows look valid."""
    result[0] = torch.cat([result[0], result[0][:1]])
    result[3] = torch.cat([result[3], result[3][:1]])
    result[4] = torch.cat([result[4], result[4][:1]])


def _count_off(result: list[Any]) -> None:
    result[2][-1] += 1


def _global_length(result: list[Any]) -> None:
    result[2] = torch.nn.functional.pad(result[2], (0, 4))


def _spill(result: list[Any]) -> None:
    """The last row of expert 0 stands in expert 1's region."""
    rows, counts = result[0], result[2]
    n, m = int(counts[0]), int(counts[1])
    rows[1, m] = rows[0, n - 1]
    counts[0], counts[1] = n - 1, m + 1


ARRIVING: dict[str, tuple[str, Callable[[list[Any]], None], str]] = {
    "P22 a slot is lost": ("eager-alltoall", _lose_slot, "no row here holds token"),
    "P20 another expert's id": ("eager-alltoall", _wrong_expert, "no row here holds token"),
    "P81 the weight is stale": ("eager-alltoall", _stale_weight, "the row is here, with another weight"),
    "rows in another order": ("eager-alltoall", _swap_rows, "no row here holds token"),
    "a torn row": ("eager-alltoall", _torn_row, "no row here holds token"),
    "P26 ids behind the rows": ("eager-alltoall", _tail_ids, "rows that belong to no routed slot"),
    "a wrong count": ("eager-alltoall", _count_off, "counts"),
    "counts of global length": ("eager-batched-alltoall", _global_length, "must be (2,) torch.int32"),
    "a wrong count, batched": ("eager-batched-alltoall", _count_off, "counts"),
    "P23 a row in the next region": ("eager-batched-alltoall", _spill, "counts"),
    "rows moved, batched": ("eager-batched-alltoall", _swap_rows, "no row here holds token"),
}


@pytest.mark.parametrize("fault", ARRIVING)
def test_a_fault_of_dispatch_on_the_last_rank(fault: str) -> None:
    name, change, words = ARRIVING[fault]
    line = line_for(name, RANKS, "routing=uniform,spread=uneven", sizes="T=12,H=20,I=13,E=6,K=3")
    (shown,) = simulate(PAIRS[name], parse_case(line))
    assert not judged(line, name, shown)
    found = judged(line, name, [*shown[:2], tampered(shown[2], change)])

    assert found and {f.rank for f in found} == {2}
    assert str(found[0].stage) == "DISPATCH" and words in found[0].message, found[0]


def _first_slot_only(prepare: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def call(a1: Tensor, s1: Any, s2: Any, weights: Tensor, ids: Tensor, *rest: Any) -> Any:
        return prepare(a1, s1, s2, weights, torch.where(torch.arange(ids.size(1)) == 0, ids, -1), *rest)

    return call


def _minus_one_wraps(prepare: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def call(a1: Tensor, s1: Any, s2: Any, weights: Tensor, ids: Tensor, num_experts: int, *rest: Any) -> Any:
        return prepare(a1, s1, s2, weights, ids % num_experts, num_experts, *rest)

    return call


@pytest.mark.parametrize("name", ["eager-allgather", "eager-alltoall"])
def test_p27_only_the_first_slot_is_sent(name: str) -> None:
    line = line_for(name, RANKS, "routing=uniform")
    found = judged(line, name, with_fault(name, line, "prepare", _first_slot_only))

    assert found and {str(f.stage) for f in found} == {"DISPATCH"} and {f.rank for f in found} == {0, 1, 2}


@pytest.mark.parametrize("name", ["eager-allgather", "eager-alltoall"])
def test_p19_minus_one_becomes_the_last_expert(name: str) -> None:
    line = line_for(name, RANKS, "routing=minus1")
    found = judged(line, name, with_fault(name, line, "prepare", _minus_one_wraps))

    assert found and {f.rank for f in found} == {2}, "expert 6 lives on the last rank"


def finalize_fault(fault: str) -> Callable[[Callable[..., Any], int], Callable[..., Any]]:
    def wrap(finalize: Callable[..., Any], rank: int) -> Callable[..., Any]:
        def call(output: Tensor, y: Tensor, weights: Tensor, ids: Tensor, flag: bool) -> None:
            if fault == "P70 weights once more":
                y = y * weights[:, :, None].nan_to_num().to(y.dtype) if y.dim() == 3 and y.numel() else y
            finalize(output, y, weights, ids, flag)
            if fault == "P72 reduced again":
                output.mul_(2)
            if fault == "P77 not cleared" and output.numel():
                output += 1
            if fault == "rank 1's rows rolled" and rank == 1:
                output.copy_(output.roll(1, 0))

        return call

    return wrap


@every_showing
@pytest.mark.parametrize("fault", ["P72 reduced again", "P77 not cleared", "rank 1's rows rolled"])
def test_a_fault_of_combine(name: str, fault: str) -> None:
    line = line_for(name, RANKS, "values=normal,routing=uniform")
    found = judged(line, name, with_fault(name, line, "finalize", finalize_fault(fault)))

    assert found and {str(f.stage) for f in found} == {"COMBINE"}
    assert {f.rank for f in found} == ({1} if fault.startswith("rank 1") else {0, 1, 2})


@pytest.mark.parametrize("name", ["eager-allgather", "eager-alltoall"])
def test_p70_weights_once_more(name: str) -> None:
    line = line_for(name, RANKS, "values=normal,routing=uniform")
    found = judged(line, name, with_fault(name, line, "finalize", finalize_fault("P70 weights once more")))

    assert found and {str(f.stage) for f in found} == {"COMBINE"}


def test_p83_rows_that_fill_up_are_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding of the all-gather keeps old tokens: they are rows that no rank routed."""
    name = "eager-allgather"
    line = line_for(name, RANKS, "routing=uniform,spread=uneven")
    right = ranks_all_gather._filled_up

    def dirty(column: Tensor, rows: int, value: int) -> Tensor:
        full = right(column, rows, value)
        if 0 < column.size(0) < rows:
            full[column.size(0) :] = column[:1]
        return full

    monkeypatch.setattr(ranks_all_gather, "_filled_up", dirty)
    (shown,) = simulate(PAIRS[name], parse_case(line))
    found = judged(line, name, shown)

    assert found and str(found[0].stage) == "DISPATCH"


def test_p21_a_map_read_as_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts taken for local on every rank: rank 0 and all others compute what is not theirs."""
    name = "eager-allgather"
    line = line_for(name, RANKS, "routing=uniform")
    monkeypatch.setattr(ranks_all_gather, "local_only", lambda ids, grid, rank: ranks_common.local_only(ids, grid, 0))
    (shown,) = simulate(PAIRS[name], parse_case(line))
    found = judged(line, name, shown)

    assert found and {f.rank for f in found} == {1, 2}, "rank 0 is right by accident, and the others are compared too"


def test_p28_ids_of_nobody_are_refused_before_anything_moves() -> None:
    name = "eager-alltoall"
    case = parse_case(line_for(name, RANKS))
    inputs = [i.map({"topk_ids": torch.where(i.topk_ids == 6, 7, i.topk_ids)}) for i in make_world_inputs(case)]
    with pytest.raises(ValueError, match="= 7 is out of range"):
        simulate(PAIRS[name], case, [inputs])


def test_p71_a_shared_term_on_every_rank() -> None:
    """The oracle counts it once: R times the shared expert is far outside."""
    case = parse_case("T=9,H=20,I=13,E=7,K=3,shared=16,ranks=3,seed=4")
    whole = make_inputs(whole_case(case))
    expect = WorldExpectation(case.world, whole, Claims())
    once = run(whole)["out"]
    plain = run(replace(whole, problem=replace(whole.problem, shared=0)))["out"]
    thrice = (plain.float() + 3 * (once.float() - plain.float())).to(once.dtype)

    def outs(out: Tensor) -> list[Shown]:
        return [{"out": out[case.world.rows(rank)]} for rank in range(3)]

    assert not judge_world(expect, outs(once))["out"].findings
    assert {f.rank for f in judge_world(expect, outs(thrice))["out"].findings} == {0, 1, 2}


def test_p69_an_empty_rank_must_still_return_its_shape() -> None:
    name = "eager-alltoall"
    line = line_for(name, RANKS, "spread=one")
    (shown,) = simulate(PAIRS[name], parse_case(line))

    assert not judged(line, name, shown)
    shown[0]["out"] = shown[0]["out"][:, :0]
    (found,) = judged(line, name, shown)
    assert found.rank == 0 and "must be (0, 20)" in found.message


def test_conservation_names_the_expert_and_where_it_lives() -> None:
    name = "eager-batched-alltoall"
    line = line_for(name, RANKS, "routing=uniform")
    (shown,) = simulate(PAIRS[name], parse_case(line))
    shown[1]["expert_num_tokens"][0] -= 1
    (found,) = check_conservation(expectation(line, name), shown)

    assert (found.expert, found.rank) == (3, 1) and "were computed" in found.message


@pytest.mark.parametrize("routing", ["uniform", "hot", "dup"])
def test_p22_capacity_straddled(routing: str) -> None:
    """The least capacity that holds the call passes; one row less is refused on every rank, not cut off."""
    name = "eager-batched-alltoall"
    line = line_for(name, RANKS, f"routing={routing},spread=uneven")
    fits = fitting_capacity(expectation(line, name).ranks)
    enough = line_for(name, RANKS, f"routing={routing},spread=uneven,capacity={fits}")
    (shown,) = simulate(PAIRS[name], parse_case(enough))

    assert not judged(enough, name, shown)
    with pytest.raises(ValueError, match=f"holds {fits - 1}; nothing was sent"):
        simulate(PAIRS[name], parse_case(line_for(name, RANKS, f"routing={routing},spread=uneven,capacity={fits - 1}")))


def test_identity_finds_a_duplicate_and_a_lost_row() -> None:
    name = "eager-alltoall"
    line = line_for(name, RANKS, "routing=uniform")
    case, expect = parse_case(line), expectation(line, name)
    (shown,) = simulate(PAIRS[name], case, [tagged(make_world_inputs(case))])
    rows, ids = shown[1]["rows"], shown[1]["row_ids"]
    rows[1] = rows[0]
    found = check_identity(1, expect.ranks[1].pairs, rows, ids)

    assert found and all(f.rank == 1 for f in found)
    assert any("is here 2 times" in f.message for f in found) or any("is here 0 times" in f.message for f in found)


def test_p78_a_rank_without_tokens_that_skips_the_collective_is_not_waited_for_in_silence() -> None:
    """The others' next collective raises when the rank leaves; over processes the watchdog names it."""
    case = parse_case(line_for("eager-alltoall", RANKS, "spread=empty"))
    inputs = make_world_inputs(case)

    def body(link: Link) -> Any:
        if inputs[link.rank].problem.T == 0:
            raise RuntimeError("left early: no tokens")
        return run_rank(PAIRS["eager-alltoall"], [inputs[link.rank]], case.world, link)

    with pytest.raises(RuntimeError, match="left early"):
        on_ranks(RANKS, body)


def test_p79_a_protocol_of_another_kind_on_one_rank_is_told_to_all() -> None:
    """One rank takes the all-gather where the others take the all-to-all."""
    case = parse_case(line_for("eager-alltoall", RANKS))
    inputs = make_world_inputs(case)

    def body(link: Link) -> str:
        pair: RankPair = PAIRS["eager-allgather" if link.rank == 2 else "eager-alltoall"]
        with pytest.raises(ValueError) as raised:
            run_rank(pair, [inputs[link.rank]], case.world, link)
        return str(raised.value)

    assert all(
        "call: rank 0/1 has AllToAll.prepare, rank 2 has AllGatherReduceScatter.prepare" in text
        for text in on_ranks(RANKS, body)
    )


@every_showing
def test_a_fault_of_one_ranks_experts(name: str) -> None:
    """Found in GEMM2 on the rank that computed it, named by the token's own rank; nobody's COMBINE is blamed."""
    line = line_for(name, RANKS, "values=normal,routing=uniform")
    right = PAIRS[name].experts

    def experts(inputs: Inputs) -> Any:
        made = right(inputs)
        if inputs.problem.ep_rank == 1:
            apply = made.apply
            made.apply = lambda *arguments: apply(*arguments).mul_(1.05)  # type: ignore[method-assign]
        return made

    (shown,) = simulate(replace(PAIRS[name], experts=experts), parse_case(line))
    found = judged(line, name, shown)

    assert found and {str(f.stage) for f in found} == {"GEMM2"} and {f.rank for f in found} == {1}
    assert found[0].expert in parse_case(line).world.grid.local(1) and "of rank" in found[0].message
