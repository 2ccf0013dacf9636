"""The comparison of collectives: right programs raise no alarm, each kind of wrong one does, finished or not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import rank_functions as functions

from moeproof.harness.ranks import Entry, RankPool
from moeproof.harness.ranks.compare import mismatches
from moeproof.harness.ranks.journal import Journal, read_journal

REDUCE = Entry("all_reduce", "0", (0, 1), "float32", ((4,),), agree="sum")
GATHER = replace(REDUCE, op="all_gather_into_tensor", outputs=((8,),), agree="")
EXCHANGE = Entry("all_to_all_single", "0", (0, 1), "float32", ((4, 3),), ((4, 3),), (2, 2), (2, 2), 3)
SEND = Entry("send", "0", (0, 1), "float32", ((4,),), peer=1)
RECV = replace(SEND, op="irecv", peer=0)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool


def test_collectives_of_every_kind_agree(pool: RankPool) -> None:
    run = pool.run(functions.everything)

    assert run.ok, run
    assert run.results[3] == ["", "r", "rr", "rrr"]


def test_groups_are_compared_among_their_members(pool: RankPool) -> None:
    run = pool.run(functions.subgroups)

    assert run.ok, run
    assert run.results == (2.0, 2.0, 4.0, 4.0)


def test_a_minority_is_named(pool: RankPool) -> None:
    run = pool.run(functions.one_reduces_otherwise, 2)

    assert run.rank == 2
    assert run.mismatches[0].other == 0


def test_functional_collectives_are_recorded() -> None:
    with RankPool(1) as pool:
        run = pool.run(functions.functional_sum)
        assert run.results == (2.0,), run
        (entry,) = read_journal(pool._members[0].journal).entries

    assert (entry.op, entry.agree, entry.finished) == ("functional.all_reduce", "sum", True)


@pytest.mark.parametrize(
    ("one", "what"),
    [
        ([], "rank 1 calls one fewer"),
        ([GATHER], "another operation, all_gather_into_tensor against all_reduce"),
        ([replace(REDUCE, dtype="bfloat16")], "another dtype, bfloat16 against float32"),
        ([replace(REDUCE, agree="max")], "'max' against 'sum'"),
        ([replace(REDUCE, inputs=((5,),))], "other sizes"),
        ([REDUCE, REDUCE], "rank 0 calls one fewer"),
    ],
)
def test_each_difference_has_its_words(one: list[Entry], what: str) -> None:
    (found,) = mismatches([[REDUCE], one], [True, True])

    assert found.what == what


def test_what_a_running_rank_has_not_called_proves_nothing() -> None:
    assert mismatches([[REDUCE, GATHER], [REDUCE]], [False, False]) == []
    assert mismatches([[REDUCE, GATHER], [REDUCE]], [True, False]) == []
    assert len(mismatches([[REDUCE, GATHER], [REDUCE]], [False, True])) == 1
    assert len(mismatches([[REDUCE, GATHER], [REDUCE, REDUCE]], [False, False])) == 1


def test_exchanges_are_compared_pair_by_pair() -> None:
    uneven = [replace(EXCHANGE, send=(2, 5), receive=(2, 1)), replace(EXCHANGE, send=(1, 3), receive=(5, 3))]
    assert mismatches([[uneven[0]], [uneven[1]]], [True, True]) == []

    (found,) = mismatches([[uneven[0]], [replace(uneven[1], receive=(4, 3))]], [True, True])
    assert found.what == "rank 0 sends 5 rows to rank 1, which expects 4"
    (found,) = mismatches([[EXCHANGE], [replace(EXCHANGE, row=2)]], [True, True])
    assert found.what == "rank 0 sends 6 elements to rank 1, which expects 4"
    (found,) = mismatches([[EXCHANGE], [replace(EXCHANGE, send=(4,))]], [True, True])
    assert found.what == "rank 1 gives 1 splits for 2 ranks"


def test_sends_and_receives_are_matched_in_order() -> None:
    assert mismatches([[SEND], [RECV]], [True, True]) == []
    assert mismatches([[SEND], []], [True, False]) == []
    assert mismatches([[SEND], [replace(RECV, peer=None)]], [True, True]) == [], "a receive from anyone"

    (found,) = mismatches([[SEND, SEND], [RECV]], [True, True])
    assert (found.rank, found.index, found.what) == (1, 1, "a send without its receive")
    (found,) = mismatches([[SEND], [replace(RECV, inputs=((3,),))]], [True, True])
    assert found.what == "send and receive differ"


def test_a_journal_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.enter("DISPATCH")
    journal.end(journal.begin(EXCHANGE))
    journal.begin(REDUCE)
    with path.open("a") as file:
        file.write('{"op": "cut sh')
    story = read_journal(path)

    assert story.entries == (
        replace(EXCHANGE, stage="DISPATCH", index=0, finished=True),
        replace(REDUCE, stage="DISPATCH", index=1),
    )
    assert (story.stage, story.open) == ("DISPATCH", story.entries[1])
    assert str(story.entries[0]) == (
        "#0 all_to_all_single float32 (4, 3) -> (4, 3) sends [2, 2] expects [2, 2] among ranks 0,1"
    )
