"""The oracle's worlds: what ranks compute together is what one rank computes alone, for 1 to 64 of them."""

from __future__ import annotations

import pytest
import torch
from rank_kit import PAIRS, SHOWING, every_pair, every_showing, expectation, findings, line_for, simulate

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.cases.world_sample import world_sample
from moeproof.harness.cases.worlds import make_world_inputs, whole_case
from moeproof.harness.ranks.checks import WorldExpectation, check_conservation, check_same_bits, permuted, without_dispatch
from moeproof.harness.ranks.pairs import support
from moeproof.harness.ranks.tags import check_identity, identify, tagged
from moeproof.reference.contract import Claims, Inputs, World
from moeproof.reference.eager.layer import run as one_rank
from moeproof.reference.oracle import activations, chain
from moeproof.reference.oracle.experts import gemm1_exact, gemm2_exact
from moeproof.reference.ranks import (
    arrived,
    batched,
    home_inputs,
    rank_expectations,
    rank_inputs,
    rank_outputs,
    received,
    routed,
    sent_tokens,
)

Tensor = torch.Tensor
RANKS = [1, 2, 3, 4, 8, 64]
WORLDS = {
    "linear": "routing=minus1,spread=uneven",
    "round robin": "routing=dup,placement=round_robin,spread=empty",
    "replicas": "routing=zipf,redundant=9,spread=one",
    "shared": "routing=uniform,shared=12,shared_gate=1,scale_on_sum=2.5,spread=uneven",
    "identity experts": "routing=dup,router=softmax:zero_experts=3,spread=uneven",
    "fused shared": "routing=uniform,router=sigmoid:fused_shared=2,expert_bias=1,spread=uneven",
}


def _line(ranks: int, extra: str) -> str:
    line = f"T=21,H=12,I=9,E=70,K=3,dtype=fp32,{extra},ranks={ranks},seed=8"
    if ranks == 1:
        options = (part for part in line.split(",") if part.split("=")[0] not in ("spread", "redundant", "ranks"))
        line = ",".join(options)
    return str(parse_case(line))


def _computed(world: World, ranks: list[Inputs]) -> list[Tensor]:
    """float64 out of every rank the long way round: arrive, compute there in float64, come back, weigh and sum."""
    homes = [home_inputs(inputs) for inputs in ranks]
    sums = [torch.zeros(h.problem.T, world.problem.H, dtype=torch.float64) for h in homes]
    for rank, pairs in enumerate(received(world, ranks)):
        here = arrived(world, ranks, rank, pairs)
        at = ranks[rank]
        there = Inputs(
            **{
                **dict(at.tensors()),
                "problem": at.problem,
                "hidden_states": here.rows,
                "topk_ids": here.ids,
                "topk_weights": here.weights,
            }  # type: ignore[arg-type]
        )
        gate_up, _ = gemm1_exact(there, here.rows, Claims())
        y, _ = gemm2_exact(there, activations.exact(gate_up, world.problem.act), Claims())
        place = {(int(s), int(t)): n for n, (s, t) in enumerate(zip(here.source, here.token, strict=True))}
        for pair in pairs:
            w = float(ranks[pair.source].topk_weights[pair.token, pair.slot].double())
            sums[pair.source][pair.token] += w * y[place[pair.source, pair.token], pair.slot]
    return sums


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("reason", ["linear", "round robin", "replicas", "fused shared"])
def test_the_long_way_round_gives_the_same_sum(ranks: int, reason: str) -> None:
    """Dispatch, experts on their ranks and combine against one rank's oracle: equal up to float64 rounding."""
    case = parse_case(_line(ranks, WORLDS[reason]))
    world, whole = case.world, make_inputs(whole_case(case))
    want = [value.value for value in rank_outputs(world, whole, Claims())]
    got = _computed(world, make_world_inputs(case))

    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("reason", WORLDS)
def test_every_rank_ends_with_its_rows_of_the_whole(ranks: int, reason: str) -> None:
    """Replicated shared and identity experts enter once; replicas, placement and spread change nothing."""
    case = parse_case(_line(ranks, WORLDS[reason]))
    whole = make_inputs(whole_case(case))
    views = rank_expectations(case.world, whole, Claims())
    out = chain(whole, Claims())["out"]

    for rank, view in enumerate(views):
        assert torch.equal(view.out.value, out.value[case.world.rows(rank)])
        assert view.out.value.shape == (case.world.tokens[rank], 12)


@pytest.mark.parametrize("ranks", RANKS)
def test_what_is_sent_is_what_arrives(ranks: int) -> None:
    """Per expert, per rank, per pair of ranks; and both layouts hold the same pairs."""
    line = f"T=21,H=12,I=9,E=70,K=3,layout=batched,routing=dup,ranks={ranks},seed=8"
    case = parse_case(line if ranks > 1 else line.replace(",ranks=1", ""))
    world, inputs = case.world, make_world_inputs(case)
    at = received(world, inputs)

    assert sorted(pair for pairs in at for pair in pairs) == routed(world, inputs)
    sent = sent_tokens(world, inputs)
    for rank in range(ranks):
        here = arrived(world, inputs, rank, at[rank])
        assert torch.equal(torch.bincount(here.source, minlength=ranks), sent[:, rank])
        there = batched(world, inputs, rank, at[rank])
        rows, regions = there.rows, there.pairs
        assert [len(region) for region in regions] == here.counts.tolist()
        assert int(here.counts.sum()) == len(at[rank]) == int((here.ids >= 0).sum())
        assert int(rows.isnan().all(dim=2).sum()) == rows.shape[0] * rows.shape[1] - len(at[rank])


@pytest.mark.parametrize(("tp", "sp"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1)])
def test_shards_sum_to_the_whole(tp: int, sp: int) -> None:
    """The same exact value, shared expert and bias counted once; in exact recipes there is nothing to allow."""
    extra = f",tp={tp}" + (f",sp={sp}" if sp else "") if tp > 1 else ""
    for values in ("values=sat,expert_bias=1", "shared=8,expert_bias=1"):
        case = parse_case(f"T=11,H=12,I=9,E=5,K=2,{values},ranks=4,spread=uneven{extra},seed=3")
        whole = make_inputs(whole_case(case))
        out = chain(whole, Claims())["out"]
        for rank, got in enumerate(rank_outputs(case.world, whole, Claims())):
            rows = case.world.rows(rank)
            assert out.bound is not None and got.bound is not None
            assert torch.allclose(got.value, out.value[rows], rtol=0, atol=1e-9)
            assert bool(got.bound.all()) if values.startswith("shared") else not bool(got.bound.any())


@every_pair
@pytest.mark.parametrize(("ranks", "values"), [(2, "sat"), (8, "sat"), (8, "normal"), (64, "sat")])
def test_the_reference_implementations_on_threads(name: str, ranks: int, values: str) -> None:
    line = line_for(name, ranks, f"values={values},routing=minus1,spread=uneven", sizes="T=70,H=12,I=9,E=70,K=3")
    (shown,) = simulate(PAIRS[name], parse_case(line))

    assert not findings(expectation(line, name), shown)
    assert name not in SHOWING or not check_conservation(expectation(line, name), shown)


@every_showing
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_identity_tags_arrive(name: str, ranks: int) -> None:
    """Who arrived, decoded from the rows themselves."""
    line = line_for(name, ranks, "routing=dup,spread=uneven", sizes="T=30,H=20,I=13,E=11,K=3")
    case, expect = parse_case(line), expectation(line, name)
    (shown,) = simulate(PAIRS[name], case, [tagged(make_world_inputs(case))])

    for rank, (view, tensors) in enumerate(zip(expect.ranks, shown, strict=True)):
        rows, ids = tensors["rows"], tensors.get("row_ids")
        if ids is None:
            local = torch.tensor(case.world.grid.local(rank))
            counts = tensors["expert_num_tokens"].long()
            ids = local.repeat_interleave(counts)[:, None]
            rows = torch.cat([region[:n] for region, n in zip(rows, counts.tolist(), strict=True)])
        assert not check_identity(rank, view.pairs, rows, ids)


def test_a_tag_in_pieces_is_nobody() -> None:
    case = parse_case("T=9,H=20,I=13,E=7,K=3,ranks=3,seed=1")
    rows = torch.cat([inputs.hidden_states for inputs in tagged(make_world_inputs(case))])
    torn = rows.clone()
    torn[4, 13:] = rows[5, 13:]
    torn[5] = torch.nan

    assert identify(rows) == [(rank, token) for rank in range(3) for token in range(3)]
    assert identify(torn)[4] is None and identify(torn)[5] is None


@every_pair
@pytest.mark.parametrize("values", ["sat", "int"])
def test_with_and_without_dispatch_to_the_bit(name: str, values: str) -> None:
    """An exact case on four ranks against the plain layer on one, which dispatches nothing."""
    act = ",act=relu_no_mul,dtype=fp32" if values == "int" else ""
    line = line_for(name, 4, f"values={values},routing=minus1,spread=uneven{act}")
    case = parse_case(line)
    (shown,) = simulate(PAIRS[name], case)
    alone = one_rank(make_inputs(whole_case(case)))["out"]

    assert not check_same_bits("out", [s["out"] for s in shown], without_dispatch(case.world, alone), "one rank alone")


@every_pair
def test_which_rank_a_token_is_on_does_not_matter(name: str) -> None:
    line = line_for(name, 4, "values=sat,routing=minus1,spread=uneven")
    case = parse_case(line)
    order = [2, 0, 3, 1]
    world, moved = permuted(case.world, make_inputs(whole_case(case)), order)
    (before,) = simulate(PAIRS[name], case)
    (after,) = simulate(PAIRS[name], case, [[rank_inputs(world, moved, rank) for rank in range(4)]])

    assert not check_same_bits("out", [s["out"] for s in after], [before[r]["out"] for r in order], "the same on other ranks")


@every_pair
@pytest.mark.parametrize("extra", ["strided=1", "inplace=1", "K=1,weight_on_input=1"])
def test_inputs_are_not_modified(name: str, extra: str) -> None:
    """Unless in place is declared: then hidden_states is the output, and nothing else changes."""
    case = parse_case(line_for(name, 3, "values=normal,routing=minus1,spread=uneven", extra))
    inputs = make_world_inputs(case)
    before = [digest(i) if "inplace" not in extra else digest(_without_x(i)) for i in inputs]
    (shown,) = simulate(PAIRS[name], case, [inputs])

    assert [digest(i) if "inplace" not in extra else digest(_without_x(i)) for i in inputs] == before
    if "inplace" in extra:
        assert all(torch.equal(i.hidden_states, s["out"]) for i, s in zip(inputs, shown, strict=True))


def _without_x(inputs: Inputs) -> Inputs:
    return inputs.map({"hidden_states": torch.zeros_like(inputs.hidden_states)})


@pytest.mark.parametrize("case", list(world_sample(10)), ids=str)
def test_random_worlds(case: Case) -> None:
    """A sample of ci/simulated_ranks.py."""
    whole = make_inputs(whole_case(case))
    for name, pair in PAIRS.items():
        if support(pair, case.world, "simulated") is None:
            (shown,) = simulate(pair, case)
            assert not findings(WorldExpectation(case.world, whole, pair.claims, pair.quant1), shown), name
