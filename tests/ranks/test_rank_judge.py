"""The judge of several ranks: what one plain call cannot show, and that nothing healthy alarms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rank_kit import PAIRS, every_pair, line_for

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.compare import compare
from moeproof.harness.judging.misround import counted
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.ranks.turns import rank_order, replays, turns
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import Claims, ContractError, FusedMoEModularKernel, RankPair
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.oracle.value import stored

Tensor = torch.Tensor
RANKS = 2
BASE = PAIRS["eager-alltoall"]


def judged(pair: RankPair, line: str) -> Verdict:
    return RankSession(RANKS, "simulated", 10.0).judge(pair, pair, parse_case(line))


def after(change: Callable[[Any, Tensor, Tensor], Tensor], **claims: str) -> RankPair:
    """The pair with change(kernel, x, out) after each call."""

    class Kernel(FusedMoEModularKernel):
        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            return change(self, x, super().forward(x, *arguments, **options))

    return replace(BASE, name="changed", kernel=Kernel, claims=replace(BASE.claims, **claims))


@every_pair
@pytest.mark.parametrize(
    "extra",
    ["history=interleave,spread=uneven,expert_bias=1", "history=graph,expert_bias=1", "relation=ranks", "relation=double"],
)
def test_healthy_pairs_pass(name: str, extra: str) -> None:
    verdict = judged(PAIRS[name], line_for(name, RANKS, "values=normal,routing=minus1", extra, sizes="T=16,H=32,I=16,E=5,K=2"))

    assert verdict.outcome is Outcome.PASS, verdict
    assert verdict.checked > 16 * 32


@pytest.mark.parametrize("relation", ["permute", "duplicate", "split", "relabel", "flip"])
def test_relations_hold_across_ranks(relation: str) -> None:
    line = line_for("eager-alltoall", RANKS, f"values=normal,spread=uneven,relation={relation}", sizes="T=16,H=32,I=16,E=5,K=2")

    assert judged(BASE, line).outcome is Outcome.PASS


def test_a_write_past_a_buffer_is_named_with_its_rank() -> None:
    def overrun(kernel: Any, x: Tensor, out: Tensor) -> Tensor:
        if kernel.prepare_finalize.link.rank == 1:
            torch.as_strided(out, (out.numel() + 4,), (1,))[-4:] = 0
        return out

    verdict = judged(after(overrun), line_for("eager-alltoall", RANKS))

    assert verdict.outcome is Outcome.FAIL and verdict.rank == 1
    assert "past the end of a buffer that the candidate allocated" in verdict.findings[0].message


def test_what_unwritten_memory_held_is_told_apart() -> None:
    """A column that rank 1 writes only where it already is a number: right under two of the patterns."""

    def forgets(kernel: Any, x: Tensor, out: Tensor) -> Tensor:
        scratch = torch.empty_like(out)
        if kernel.prepare_finalize.link.rank == 1 and float(scratch.flatten()[0]) == 10000.0:
            out[:, -1] += 1
        return out

    verdict = judged(after(forgets), line_for("eager-alltoall", RANKS, sizes="T=16,H=32,I=16,E=5,K=2,dtype=fp32"))

    assert verdict.outcome is Outcome.FAIL and verdict.rank == 1
    assert "where unwritten memory holds 'big'" in verdict.findings[0].message


def test_bits_that_depend_on_the_call_are_flaky_unless_claimed() -> None:
    calls: dict[int, int] = {}

    def trembles(kernel: Any, x: Tensor, out: Tensor) -> Tensor:
        """Rank 1's last bit differs in every second call; far within the bound."""
        rank = kernel.prepare_finalize.link.rank
        calls[rank] = calls.get(rank, 0) + 1
        return out.nextafter(torch.zeros_like(out)) if rank == 1 and calls[rank] % 2 else out

    line = line_for("eager-alltoall", RANKS, "values=normal,dtype=fp32", sizes="T=16,H=32,I=16,E=5,K=2")
    flaky = judged(after(trembles), line)

    assert (flaky.outcome, flaky.rank) == (Outcome.FLAKY, 1), flaky
    assert judged(after(trembles, deterministic="none"), line).outcome is Outcome.PASS


def test_misrounding_is_counted() -> None:
    """Every element within its bound, and yet too many that are not the exact result's own rounding."""
    exact = 1 + 2.0**-8 + 2.0**-13 * (1 + torch.arange(4096, dtype=torch.float64).view(64, 64) % 97) / 97
    want = stored(exact, torch.full_like(exact, 2.0**-12), format_of(torch.bfloat16))
    within = compare("out", torch.ones(64, 64, dtype=torch.bfloat16), want)

    assert not within.findings
    (found,) = counted(within, "out", torch.ones(64, 64, dtype=torch.bfloat16), want).findings
    assert "are not the exact result's own rounding" in found.message


def test_a_relation_sees_a_rank_that_no_bound_sees() -> None:
    """Rank 1 adds a little to what it returns, within the claimed bound; the same tokens elsewhere do not get it."""

    def by_rank(kernel: Any, x: Tensor, out: Tensor) -> Tensor:
        return out.nextafter(2 * out) if kernel.prepare_finalize.link.rank == 1 else out

    line = line_for("eager-alltoall", RANKS, "values=normal,dtype=fp32", sizes="T=16,H=32,I=16,E=5,K=2")
    pair = after(by_rank, deterministic="batch")

    assert judged(pair, line).outcome is Outcome.PASS
    verdict = judged(pair, f"{line.replace(',seed=', ',relation=ranks,seed=')}")
    assert verdict.outcome is Outcome.FAIL, verdict
    assert "relation ranks is broken" in verdict.findings[0].message and verdict.findings[0].rank is not None


@pytest.mark.parametrize("extra", ["", "tp=2,sp=1"])
def test_the_gate_names_what_a_case_cannot_see(extra: str) -> None:
    """A claim so weak that a dropped slot passes: the verdict says so instead of PASS."""
    line = line_for("eager-alltoall", RANKS, "values=cancel,K=4,T=3", extra, sizes="H=300,I=256,E=4")
    weak = replace(BASE, claims=Claims(accumulate="dtype", combine="dtype", activation="dtype"))
    verdict = judged(weak, line)

    assert verdict.outcome is Outcome.VACUOUS, verdict
    assert "would pass for" in verdict.reason


@pytest.mark.parametrize("extra", ["history=stream", "huge=1"])
def test_what_ranks_are_not_judged_by_says_so(extra: str) -> None:
    verdict = judged(BASE, line_for("eager-alltoall", RANKS, extra))

    assert verdict.outcome is Outcome.UNSUPPORTED and "is judged on one rank" in verdict.reason


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("relation=ranks", "it needs ranks > 1"),
        ("ranks=2,tp=2,relation=ranks", "each token on one rank only"),
        ("ranks=2,redundant=1,relation=ranks", "redundant must be 0"),
    ],
)
def test_impossible_relations_are_refused(extra: str, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        parse_case(f"T=9,H=20,I=13,E=7,K=3,{extra}")


def test_the_plan_follows_from_the_case() -> None:
    case = parse_case("T=16,H=32,I=16,E=5,K=2,ranks=3,history=interleave,relation=ranks,seed=3")
    plan = turns(case)
    late = [turn for turn in plan if turn.late is not None]

    assert plan == turns(parse_case(str(case))), "every rank makes the same list"
    assert [turn.pattern for turn in plan[:4]] == ["nan", "ff", "big", "nan"] and plan[3].instance == plan[0].instance
    assert len({(turn.instance, turn.late) for turn in late}) == 1
    assert late[-1].repeats(plan[0]) and not late[0].repeats(plan[0])
    assert sorted(rank_order(case)) == [0, 1, 2] and all(a != b for a, b in enumerate(rank_order(case)))
    assert len({turn.case for turn in replays(case)}) == 12
