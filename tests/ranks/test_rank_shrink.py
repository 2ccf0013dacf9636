"""Cases on several ranks shrink too: fewer ranks, no shards, few tokens; the replay line names the transport."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rank_candidates import halves
from user_side import moeproof

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.on_ranks import HERE
from moeproof.harness.shrinking.reductions import reductions
from moeproof.harness.shrinking.shrink import blame, shrink
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import Candidate, ContractError

BIG = "T=33,H=40,I=26,E=13,K=3,dtype=fp16,routing=minus1,ranks=8,spread=uneven,tp=2,sp=1,strided=1,seed=5"
FILE = str(Path(__file__).parent / "rank_candidates.py")


def test_ranks_come_down_to_two() -> None:
    tried = [(axis, case) for axis, case in reductions(parse_case(BIG))]

    assert [(c.ranks, c.tp) for axis, c in tried if axis == "ranks"][:4] == [(2, 1), (2, 2), (3, 1), (4, 1)]
    assert {"tp", "sp", "spread"} <= {axis for axis, _ in tried}
    assert all(c.ranks > 1 for _, c in tried)


def test_a_wrong_rank_shrinks_over_threads() -> None:
    found = shrink(halves, parse_case(BIG), max_seconds=40, transport="simulated")

    assert (found.case.ranks, found.case.tp, found.case.spread) == (2, 1, "even")
    assert found.tokens <= 4 and not found.case.strided
    assert blame(found.verdict) == "FAIL COMBINE out" and found.verdict.rank is not None
    assert found.replay.endswith("--transport simulated")


def test_a_hang_shrinks_over_processes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The journals tell early that the ranks are apart, so no attempt costs its deadline."""
    line = "T=12,H=20,I=13,E=7,K=3,ranks=3,spread=one,seed=5"
    code = moeproof(monkeypatch, "shrink", line, "--candidate", f"{HERE}:P79", "--transport", "gloo", "--runs", "3", "--json")
    captured = capsys.readouterr()
    found = json.loads(captured.out)

    assert code == 1, captured.err
    assert "ranks=2" in found["to"] and found["blame"].startswith("TIMEOUT"), found
    assert found["replay"].endswith(f"--candidate {HERE}:P79 --transport gloo")


def test_numbers_and_collectives_are_no_blame() -> None:
    def raised(rank: int, index: int, size: int) -> Verdict:
        where = f"collective #{index} all_gather uint8 ({size},) among ranks 0..{rank + 1} at a.py:4"
        words = f"rank {rank} raised in stage PERMUTE, after {where}: IndexError: no expert {size}\n  rank {rank}: .."
        return Verdict(Outcome.ERROR, "c", parse_case("T=9,H=20,I=13,E=7,K=3,ranks=2,seed=5"), reason=words)

    assert blame(raised(0, 3, 8)) == blame(raised(1, 2, 64)) == "ERROR rank # raised in stage PERMUTE: IndexError: no expert #"


def test_a_candidate_for_one_rank_has_nothing_to_shrink_there() -> None:
    with pytest.raises(ContractError, match="it needs a RankPair, not a Candidate"):
        shrink(Candidate("alone", lambda inputs: inputs.hidden_states), parse_case(BIG))
