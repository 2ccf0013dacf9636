"""The one-sided exchange without a GPU: interpreted kernels in processes that map each other's arenas.

Every store into a peer's arena is checked by the interpreter, and each arena's gaps are looked at afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import symm_functions as functions
import torch
from rank_kit import INSTALLED, expectation, findings, line_for

from moeproof.harness.cases.case import parse_case
from moeproof.harness.ranks import RankPool

NAMES = ("symm-standard", "symm-batched")
CALLS = {
    2: (
        "routing=uniform",
        "routing=hot,seed=6",
        "routing=minus1,seed=7",
        "routing=dup,seed=8",
        "routing=none",
        "routing=dup,seed=9",
    ),
    3: ("routing=uniform,spread=uneven,seed=7", "routing=minus1,spread=uneven,seed=6", "routing=dup,spread=uneven"),
    4: ("routing=minus1,spread=empty", "routing=uniform,spread=empty,seed=8"),
}
"""Back to back on one instance, each with other data; no rank has more tokens later than one had in the first call."""
OTHERS = {
    "no token anywhere": (2, "T=0"),
    "one rank has all": (2, "routing=minus1,spread=one"),
    "rounded": (2, "values=normal,placement=round_robin,spread=uneven,expert_bias=1"),
    "fp16": (2, "values=hetero,dtype=fp16,spread=uneven"),
    "fp32, replicas": (3, "values=normal,dtype=fp32,routing=dup,redundant=4"),
    "weight on input": (2, "values=normal,K=1,weight_on_input=1,spread=uneven"),
    "strided, in place": (2, "values=normal,strided=1,inplace=1,spread=uneven"),
    "odd bytes": (2, "values=normal,H=13,routing=minus1"),
    "shards": (4, "values=normal,routing=minus1,tp=2,spread=uneven"),
}
QUANTISED = {
    "symm-fp8-standard": (
        "scheme=fp8_block,H=160,I=64",
        "scheme=fp8_tensor_static,H=24",
        "scheme=fp8_token,K=1,weight_on_input=1",
    ),
    "symm-fp8-batched": ("scheme=fp8_block,H=160,I=64", "scheme=fp8_tensor_static,H=24"),
    "symm-quant-standard": ("scheme=mxfp4_w4a4,H=64,I=32,spread=uneven", "scheme=int8_token"),
    "symm-quant-batched": ("scheme=mxfp4_w4a4,H=64,I=32,spread=uneven", "scheme=fp8_w8a16"),
}
"""Scales by block, of all rows, by token, of one byte, and none."""


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    pools = {ranks: RankPool(ranks, deadline=60.0) for ranks in CALLS}
    yield pools
    for pool in pools.values():
        pool.close()


@cache
def known(name: str) -> str:
    assert name in INSTALLED, f"{name} is not installed"
    return name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranks", CALLS)
def test_calls_back_to_back_are_exact(pools: dict[int, RankPool], name: str, ranks: int) -> None:
    lines = [line_for(known(name), ranks, extra) for extra in CALLS[ranks]]
    run = pools[ranks].run(functions.calls, name, lines)

    assert run.ok, run
    for number, line in enumerate(lines):
        shown = [rank[number] for rank in run.results]
        assert not findings(expectation(line, name), shown), line
        assert all("rows" in s and "expert_num_tokens" in s for s in shown)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reason", OTHERS)
def test_other_problems_within_their_bounds(pools: dict[int, RankPool], name: str, reason: str) -> None:
    ranks, extra = OTHERS[reason]
    line = line_for(known(name), ranks, extra)
    run = pools[ranks].run(functions.calls, name, [line])

    assert run.ok, run
    assert not findings(expectation(line, name), [rank[0] for rank in run.results])


@pytest.mark.parametrize(("name", "extra"), [(name, extra) for name, extras in QUANTISED.items() for extra in extras])
def test_codes_travel_with_their_scales(pools: dict[int, RankPool], name: str, extra: str) -> None:
    """Quantised before dispatch: every code and scale that arrives is judged on its bits."""
    line = line_for(known(name), 2, "values=normal,routing=minus1", extra)
    run = pools[2].run(functions.calls, name, [line])

    assert run.ok, run
    assert not findings(expectation(line, name), [rank[0] for rank in run.results])
    scaled = parse_case(line).problem.quant.a1 is not None
    assert all(("row_scales" in rank[0]) == scaled for rank in run.results)


@pytest.mark.parametrize("ranks", [2, 3])
def test_two_micro_batches_give_the_bits_of_one_call(pools: dict[int, RankPool], ranks: int) -> None:
    extras = ("routing=minus1,spread=uneven,seed=7", "routing=dup,spread=uneven,seed=7")
    lines = [line_for("symm-standard", ranks, "values=normal", extra) for extra in extras]
    names = ("symm-standard", "symm-standard-overlapped", "by copies")
    runs = [pools[ranks].run(functions.calls, name, lines) for name in names]

    assert all(run.ok for run in runs), runs
    for plain, *others in zip(*(run.results for run in runs), strict=True):
        for halves in others:
            assert all(torch.equal(a["out"], b["out"]) for a, b in zip(plain, halves, strict=True))


def test_many_slots_take_the_places_of_few(pools: dict[int, RankPool]) -> None:
    """Where every program would have to count too much, places are found before rows move."""
    lines = [line_for("symm-batched", 2, extra) for extra in ("routing=uniform", "routing=dup,seed=9")]
    runs = [pools[2].run(functions.calls, name, lines) for name in ("symm-batched", "many slots")]

    assert all(run.ok for run in runs), runs
    for few, many in zip(*(run.results for run in runs), strict=True):
        for a, b in zip(few, many, strict=True):
            live = [(e, int(n)) for e, n in enumerate(a["expert_num_tokens"])]
            assert torch.equal(a["expert_num_tokens"], b["expert_num_tokens"])
            assert all(torch.equal(a["rows"][e, :n], b["rows"][e, :n]) for e, n in live)
            assert torch.equal(a["out"], b["out"])


def test_rows_may_lie_anywhere(pools: dict[int, RankPool]) -> None:
    run = pools[2].run(functions.anywhere, NAMES[0], line_for(NAMES[0], 2, "values=normal"))

    assert run.ok and run.results == ([True] * 4,) * 2, run


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_written_between_the_fields(pools: dict[int, RankPool], name: str) -> None:
    lines = [line_for(known(name), 2, "H=13,routing=dup"), line_for(known(name), 2, "H=13,routing=minus1,seed=6")]
    run = pools[2].run(functions.gaps_are_clear, name, lines)

    assert run.ok and run.results == (True, True), run


def like(name: str) -> str:
    """An installed pair of the same layout."""
    return NAMES["batched" in name]


REFUSALS = [
    (NAMES[0], "tokens"),
    (NAMES[1], "tokens"),
    (NAMES[0], "map"),
    (NAMES[0], "experts"),
    *((name, fault) for name in ("symm-standard-overlapped", "by copies") for fault in ("tokens", "map", "experts")),
]
OWN = {"tokens": "21 tokens on this rank, at most 7 are allowed", "map": "expert_map is", "experts": "out of registers"}


@pytest.mark.parametrize(("name", "fault"), REFUSALS)
def test_a_refusing_rank_releases_the_others(pools: dict[int, RankPool], name: str, fault: str) -> None:
    """Raised on that rank before any put; told to the others; the next call on the same instance is right."""
    run = pools[3].run(functions.refused_then_well, name, line_for(like(name), 3, "spread=uneven"), fault)

    assert run.ok, run
    own = run.results[functions.GUILTY][0][1]
    told = f"RuntimeError in the experts: {own}" if fault == "experts" else own
    assert own.startswith(OWN[fault])
    for rank, (texts, outs) in enumerate(run.results):
        assert texts[0] == texts[2] == ""
        assert outs[0] is not None and outs[2] is not None and torch.equal(outs[0], outs[2])
        if rank != functions.GUILTY:
            assert texts[1] == f"rank 1 refused: {told} (this call has no result)"


def test_an_expert_without_room_fails_the_call_on_all_ranks(pools: dict[int, RankPool]) -> None:
    """Nothing is cut off: the rank of the expert finds it, and tells the others."""
    run = pools[2].run(functions.once, "symm-batched", line_for("symm-batched", 2, "routing=hot,capacity=8"))

    assert run.ok, run
    words = "expert 3 gets 9 rows, more than its region of the batched layout holds"
    assert run.results == (words, f"rank 0 refused: {words} (this call has no result)")


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_that_stays_away_is_named(pools: dict[int, RankPool], name: str) -> None:
    run = pools[2].run(functions.silent, name, line_for(name, 2), 0.1)

    assert run.ok, run
    texts, _ = run.results[0]
    assert texts[0] == ""
    assert texts[1] == "rank 0 waited 0.1 s for the rows (dispatch) of rank 1 in call 2: it is late, stopped or gone"
    assert texts[2] == f"this exchange cannot go on: {texts[1]}"
