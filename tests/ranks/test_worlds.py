"""Worlds as data: case text, spreads, grids, and every rank's share of the very same bytes."""

from __future__ import annotations

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.cases.spread import SPREADS, spread_tokens
from moeproof.harness.cases.worlds import make_rank_inputs, make_world_inputs, seeds, whole_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import ContractError, Grid, Problem, World

SIZES = "T=9,H=20,I=13,E=7,K=3"
LINES = (
    f"{SIZES},ranks=4,seed=1",
    f"{SIZES},routing=dup,ranks=7,spread=uneven,seed=2",
    f"{SIZES},expert_bias=1,ranks=4,spread=empty,tp=2,seed=3",
    f"{SIZES},act=swigluoai,expert_bias=1,ranks=4,spread=uneven,tp=4,sp=1,seed=4",
    f"{SIZES},layout=batched,storage=KN,placement=round_robin,ranks=3,spread=one,redundant=4,strided=1,seed=5",
    f"{SIZES},router=sigmoid:bias:fused_shared=2,shared=8,routing=router,ranks=2,seed=6",
)


@pytest.mark.parametrize("line", LINES)
def test_the_line_is_the_case(line: str) -> None:
    assert str(parse_case(line)) == line


@pytest.mark.parametrize("line", LINES)
def test_one_rank_alone_gets_what_it_gets_in_the_world(line: str) -> None:
    case = parse_case(line)
    alone = [digest(make_rank_inputs(case, rank)) for rank in range(case.ranks)]

    assert alone == [digest(inputs) for inputs in make_world_inputs(case)]
    assert len(set(seeds(case))) == case.ranks


def test_a_line_without_ranks_is_what_it_was() -> None:
    line = f"{SIZES},seed=1"
    case = parse_case(line)

    assert case == Case(Problem(T=9, H=20, I=13, E=7, K=3), seed=1)
    assert [digest(i) for i in make_world_inputs(case)] == [digest(make_inputs(case))]
    assert whole_case(parse_case(f"{SIZES},ranks=4,spread=one,seed=1")) == case


def test_the_ranks_hold_the_whole_layer_between_them() -> None:
    case = parse_case(f"{SIZES},expert_bias=1,ranks=3,spread=uneven,seed=1")
    whole, ranks = make_inputs(whole_case(case)), make_world_inputs(case)

    assert torch.equal(torch.cat([r.hidden_states for r in ranks]), whole.hidden_states)
    assert torch.equal(torch.cat([r.topk_ids for r in ranks]), whole.topk_ids)
    assert torch.equal(torch.cat([r.w1 for r in ranks]), whole.w1)
    assert torch.equal(torch.cat([r.b2 for r in ranks if r.b2 is not None]), whole.b2)
    assert [len(r.problem.local) for r in ranks] == [3, 2, 2]


@pytest.mark.parametrize("act", ["silu", "swigluoai", "relu_no_mul"])
def test_shards_of_I_add_up_to_the_expert(act: str) -> None:
    """w2 @ (anything that acts on columns alone) is the sum over shards; the bias of GEMM2 is added once."""
    case = parse_case(f"{SIZES},act={act},expert_bias=1,ranks=3,tp=3,seed=1")
    whole, ranks = make_inputs(whole_case(case)), make_world_inputs(case)
    gated = whole.problem.act.gated

    def columns(w1: torch.Tensor) -> torch.Tensor:
        """(E, I, H): the rows of gate, and of up where there is one, added, column by column of h."""
        if not gated:
            return w1.double()
        pairs = w1.unflatten(1, (-1, 2)) if whole.problem.act.interleaved else w1.unflatten(1, (2, -1)).transpose(1, 2)
        return pairs.double().sum(dim=2)

    want = whole.w2.double() @ columns(whole.w1)
    got = sum(r.w2.double() @ columns(r.w1) for r in ranks)

    assert torch.allclose(got, want, rtol=1e-12)
    assert whole.b2 is not None
    assert torch.equal(sum(r.b2 for r in ranks if r.b2 is not None), whole.b2)  # type: ignore[arg-type]
    assert [r.problem.I for r in ranks] == [5, 4, 4]


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 64])
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_spreads_share_all_tokens(spread: str, tokens: int, ranks: int) -> None:
    shares = spread_tokens(tokens, ranks, spread, seed=3)

    assert len(shares) == ranks and sum(shares) == tokens and min(shares) >= 0
    if spread == "uneven" and tokens:
        assert len(set(shares)) > 1
    if spread == "empty":
        assert set(shares[1::2]) == {0}
    if spread == "one":
        assert shares[-1] == tokens


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize(("experts", "ranks", "tp", "redundant"), [(7, 3, 1, 0), (10, 8, 2, 3), (64, 64, 1, 64), (5, 4, 4, 0)])
def test_every_physical_expert_has_a_home(placement: str, experts: int, ranks: int, tp: int, redundant: int) -> None:
    grid = Grid(experts, ranks, tp, redundant, placement)

    for expert in range(grid.experts):
        holders = grid.holders(expert)
        assert [r for r in range(ranks) if expert in grid.local(r)] == holders
        assert [grid.tp_rank(r) for r in holders] == list(range(tp))
        for rank in range(ranks):
            mapping = grid.expert_map(rank)
            local = expert if mapping is None else int(mapping[expert])
            assert local == (grid.local(rank).index(expert) if rank in holders else -1)


def test_replicas_take_turns() -> None:
    """Token t of rank r takes replica (r + t) mod n: all are used, and two ranks begin apart."""
    grid = Grid(3, 2, redundant=4)
    ids = torch.tensor([[0, 1, -1]] * 3, dtype=torch.int32)

    assert [grid.replicas(e) for e in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert grid.physical(ids, 0).tolist() == [[0, 1, -1], [3, 4, -1], [6, 1, -1]]
    assert grid.physical(ids, 1).tolist() == [[3, 4, -1], [6, 1, -1], [0, 4, -1]]
    beyond = torch.tensor([[3, 9, -1]], dtype=torch.int32)
    assert grid.physical(beyond, 0).tolist() == [[7, 13, -1]], "an id that no expert has does not become a replica's"
    assert all(grid.logical_of(e) == want for e, want in enumerate([0, 1, 2, 0, 1, 2, 0]))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("ranks=0", r"ranks=0 must be in \[1, 64\]"),
        ("ranks=65", r"ranks=65 must be in \[1, 64\]"),
        ("ranks=8", "make 8 groups, but there are 7 experts to share"),
        ("ranks=3,tp=2", "tp=2 must divide ranks=3"),
        ("tp=2", "tp=2 needs ranks > 1"),
        ("spread=one", "spread=one needs ranks > 1"),
        ("ranks=2,spread=odd", "spread 'odd' is not known; allowed: even, uneven, empty, one"),
        ("ranks=2,sp=1", "it needs tp > 1"),
        ("ranks=2,sp=2", "sp=2 must be 0 or 1"),
        ("ranks=2,ep=2", "ep=2 is one rank's view of a world"),
        ("ranks=2,tp=2,latent=8", "latent projections lie outside"),
        ("ranks=2,redundant=1,router=softmax:zero_experts=1", "take the ids after E"),
        ("ranks=two", "ranks='two' is not a whole number"),
    ],
)
def test_impossible_worlds_are_refused(extra: str, words: str) -> None:
    with pytest.raises(ContractError, match=words):
        parse_case(f"{SIZES},{extra},seed=1")


def test_a_world_must_hold_exactly_its_tokens() -> None:
    problem = Problem(T=9, H=20, I=13, E=7, K=3)

    with pytest.raises(ContractError, match="the ranks hold 8 tokens, T=9"):
        World(problem, (4, 4))
    with pytest.raises(ContractError, match="hold the same tokens"):
        World(problem, (5, 4), tp=2)


def test_a_candidate_for_one_rank_does_not_judge_a_world() -> None:
    (eager,) = load_candidates(["eager"])
    verdict = judge(eager, parse_case(f"{SIZES},ranks=2,seed=1"))

    assert verdict.outcome is Outcome.UNSUPPORTED and "ranks=2" in verdict.reason
