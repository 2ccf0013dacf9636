"""Quantised layers on simulated ranks: who holds which scale, what must arrive, and every pair on every scheme."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rank_kit import PAIRS, SHOWING, every_pair, expectation, findings, line_for, simulate

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.worlds import make_rank_inputs, make_world_inputs, whole_case
from moeproof.harness.ranks.checks import WorldExpectation, check_same_bits, judge_world, without_dispatch
from moeproof.harness.ranks.pairs import support
from moeproof.harness.ranks.received import received_operand
from moeproof.harness.ranks.sign_tags import sign_identities, sign_tagged
from moeproof.harness.ranks.tags import check_names, triples_of
from moeproof.reference.contract import SCHEMES, Claims, ContractError, Inputs, QuantScheme, RankPair
from moeproof.reference.contract.candidate import QUANT1
from moeproof.reference.eager.candidates import supports_batched, supports_standard
from moeproof.reference.eager.layer import run as one_rank
from moeproof.reference.eager.ranks_candidates import rank_pairs
from moeproof.reference.oracle import chain
from moeproof.reference.oracle.quant_stages import weight
from moeproof.reference.ranks import arrived, batched, rank_expectations, received

Tensor = torch.Tensor
QUANTISED = [s for s in SCHEMES.values() if s.quantised]
every_scheme = pytest.mark.parametrize("scheme", QUANTISED, ids=lambda s: s.name)
BY_TENSOR = ("fp8_tensor", "fp8_tensor_static2", "int8_tensor")
"""Schemes with a dynamic scale of a whole tensor."""


def sizes(scheme: QuantScheme, T: int = 9, shards: int = 1) -> str:
    """The narrowest layer that the scheme can quantise, on each of so many shards."""
    assert scheme.w is not None
    width = max(scheme.w.group[1], 32 if shards > 1 else 64)
    return f"T={T},H={width},I={shards * width},E=7,K=3,scheme={scheme.name}"


@every_scheme
def test_a_rank_holds_the_scales_of_its_experts_and_its_columns(scheme: QuantScheme) -> None:
    """What the codes of each rank and shard stand for is that part of the whole layer's weights."""
    for extra in ("ranks=3,placement=round_robin", "ranks=4,tp=2,sp=1,storage=KN", "ranks=3,redundant=4"):
        case = parse_case(f"{sizes(scheme, shards=2)},values=groups,{extra},seed=2")
        whole, grid = make_inputs(whole_case(case)), case.world.grid
        for rank, inputs in enumerate(make_world_inputs(case)):
            columns = grid.columns(whole.problem.I, rank)
            both = torch.cat([torch.arange(columns.start, columns.stop)] * 2)
            both[len(both) // 2 :] += whole.problem.I
            for local, expert in enumerate(grid.local(rank)):
                logical = grid.logical_of(expert)
                assert torch.equal(weight(inputs, "w1", local).values, weight(whole, "w1", logical).values[both])
                assert torch.equal(weight(inputs, "w2", local).values, weight(whole, "w2", logical).values[:, columns])
            if whole.a2_scale is not None and whole.a2_scale.dim() == 3:
                logical_ids = [grid.logical_of(e) for e in grid.local(rank)]
                assert inputs.a2_scale is not None and torch.equal(inputs.a2_scale, whole.a2_scale[logical_ids])


@every_scheme
def test_one_rank_alone_gets_what_it_gets_in_the_world(scheme: QuantScheme) -> None:
    case = parse_case(f"{sizes(scheme)},values=hetero,ranks=3,spread=uneven,storage=KN,strided=1,seed=2")
    for rank, inputs in enumerate(make_world_inputs(case)):
        alone = dict(make_rank_inputs(case, rank).tensors())
        for name, tensor in inputs.tensors():
            assert torch.equal(_bytes(tensor), _bytes(alone[name])), name


REFUSED = {
    "scheme=fp8_block,I=192,ranks=2,tp=2": "groups 128 columns of w2, which no shard may cut",
    "scheme=fp8_block,I=384,ranks=4,tp=4": "groups 128 columns of w2, which no shard may cut",
    "scheme=mxfp8,I=96,ranks=2,tp=2": "shard 0 of I=96 would hold columns 0..47; scheme mxfp8 groups 32 columns of w2",
    "scheme=nvfp4,I=80,ranks=2,tp=2": "groups 16 columns of w2, which no shard may cut",
    "scheme=int4_w4a16_g32,I=96,ranks=2,tp=2": "groups 32 columns of w2, which no shard may cut",
}


@pytest.mark.parametrize("extra", REFUSED)
def test_shards_that_cut_a_group_are_refused(extra: str) -> None:
    with pytest.raises(ContractError, match=REFUSED[extra]):
        parse_case(f"T=8,H=128,E=4,K=2,{extra},seed=1")


@pytest.mark.parametrize("extra", ["tp=2,spread=uneven", "tp=2,sp=1,expert_bias=1", "tp=4"])
@pytest.mark.parametrize("scheme", ["fp8_token", "fp8_block", "int8_tensor", "nvfp4", "int4_w4a16_zp_g32"])
def test_shards_are_each_a_layer_of_their_own(extra: str, scheme: str) -> None:
    """A scale of h is that of the shard's columns; what shards bring is summed, and their bounds too."""
    for name in ("eager-allgather", "eager-alltoall"):
        line = line_for(
            name, 4, f"{extra},values=groups,routing=minus1", sizes=sizes(SCHEMES[scheme], 8, 4 if "tp=4" in extra else 2)
        )
        (shown,) = simulate(PAIRS[name], parse_case(line))
        assert not findings(expectation(line, name), shown)


@every_scheme
def test_what_arrives_in_either_layout(scheme: QuantScheme) -> None:
    """Both layouts hold the codes and scales of the same pairs; nothing of a row that is not there."""
    case = parse_case(f"{sizes(scheme)},values=groups,layout=batched,routing=dup,ranks=3,spread=uneven,seed=8")
    views = rank_expectations(case.world, make_inputs(whole_case(case)), Claims())
    inputs = [view.inputs for view in views]
    for rank, view in enumerate(views):
        flat = arrived(case.world, inputs, rank, view.pairs, view.operand)
        regions = batched(case.world, inputs, rank, view.pairs, view.operand)
        place = {(int(s), int(t)): n for n, (s, t) in enumerate(zip(flat.source, flat.token, strict=True))}
        for expert, pairs in enumerate(regions.pairs):
            for n, pair in enumerate(pairs):
                row = place[pair.source, pair.token]
                assert torch.equal(_bytes(regions.rows[expert, n]), _bytes(flat.rows[row]))
                if regions.scales is not None and flat.scales is not None:
                    one = regions.scales.shape[1] == 1
                    a, b = regions.scales[expert, 0 if one else n], flat.scales[0 if one else row]
                    assert torch.equal(_bytes(a), _bytes(b))
            rest = _bytes(regions.rows[expert, len(pairs) :].flatten())
            assert bool((rest == 255).all())
        assert (flat.scales is None) == (scheme.a1 is None)


@every_pair
@every_scheme
def test_every_pair_on_every_scheme(name: str, scheme: QuantScheme) -> None:
    """Codes, scales, what QUANT2 makes of h, y and out of all ranks; in the exact probe nothing is allowed."""
    extra = "values=groups,routing=minus1,spread=uneven"
    if name == SHOWING[QUANTISED.index(scheme) % len(SHOWING)]:
        extra = "values=pin,routing=dup,spread=empty"
    line = line_for(name, 3, extra, sizes=sizes(scheme))
    case = parse_case(line)
    if "overlapped" in name and scheme.name in BY_TENSOR:
        assert "each micro-batch would have a scale" in str(support(PAIRS[name], case.world, "simulated"))
        return
    (shown,) = simulate(PAIRS[name], case)
    results = judge_world(expectation(line, name), shown)

    assert not [str(f) for r in results.values() for f in r.findings]
    assert name not in SHOWING or {"rows", "y"} <= results.keys()
    if "pin" in extra:
        assert max(r.ratio for r in results.values()) == 0, "the probe is exact on every rank"


@pytest.mark.parametrize("name", SHOWING)
@pytest.mark.parametrize("scheme", ["fp8_block", "fp8_token", "int8_token", "mxfp4_w4a4_up", "nvfp4_encode", "fp8_w8a16"])
def test_with_and_without_dispatch_to_the_bit(name: str, scheme: str) -> None:
    """Scales of tokens and groups are the same wherever the experts are (P25: no path of a single rank's own)."""
    line = line_for(name, 4, "values=pin,routing=minus1,spread=uneven", sizes=sizes(SCHEMES[scheme], 11))
    case = parse_case(line)
    (shown,) = simulate(PAIRS[name], case)
    alone = one_rank(make_inputs(whole_case(case)))["out"]

    assert not check_same_bits("out", [s["out"] for s in shown], without_dispatch(case.world, alone), "one rank alone")


def _variants(quant1: str) -> list[RankPair]:
    return rank_pairs(supports_standard, supports_batched, Claims(), quant1, f"-{quant1}")


@pytest.mark.parametrize("scheme", ["fp8_tensor", "int8_tensor", "fp8_block", "nvfp4", "fp8_tensor_static"])
@pytest.mark.parametrize("quant1", QUANT1)
def test_where_quant1_stands_is_the_pairs_own_rule(quant1: str, scheme: str) -> None:
    """The oracle follows what the pair declares; where the scale is of a whole tensor, another rule is another result.

    The all-to-all and the batched one, made for each rule.
    """
    line = f"{sizes(SCHEMES[scheme])},values=hetero,routing=minus1,ranks=3,spread=uneven,seed=4"
    for pair in _variants(quant1)[1::2]:
        case = parse_case(line.replace("values", f"layout={pair.layout},values"))
        whole = make_inputs(whole_case(case))
        (shown,) = simulate(pair, case)
        assert not findings(WorldExpectation(case.world, whole, pair.claims, quant1), shown), pair.name
        for other in QUANT1:
            judged = findings(WorldExpectation(case.world, whole, pair.claims, other), shown)
            assert not judged or scheme in BY_TENSOR
            if scheme in BY_TENSOR and other != quant1:
                assert judged and any(stage in judged[0] for stage in ("DISPATCH", "QUANT1")), (pair.name, other)


def test_a_world_of_one_rank_is_one_rank_under_every_rule() -> None:
    case = parse_case(f"{sizes(SCHEMES['fp8_tensor'])},values=groups,routing=minus1,seed=4")
    whole = make_inputs(case)
    want = chain(whole, Claims())["out"]
    for quant1 in ("source", "world"):
        (view,) = rank_expectations(case.world, whole, Claims(), quant1)
        assert torch.equal(view.out.value, want.value) and view.operand is not None


@pytest.mark.parametrize("name", ["eager-alltoall", "eager-batched-alltoall"])
@every_scheme
def test_identity_tags_survive_codes(name: str, scheme: QuantScheme) -> None:
    """Who arrived, read from the signs of the codes; with another token's scale a row is nobody."""
    if scheme.a1 is None:
        return  # rows travel as they are: the tags of unquantised payloads
    case = parse_case(line_for(name, 3, "routing=dup,spread=uneven", sizes=sizes(scheme)))
    ranks = sign_tagged(make_world_inputs(case))
    (shown,) = simulate(PAIRS[name], case, [ranks])
    at = received(case.world, ranks)
    for rank, tensors in enumerate(shown):
        view = expectation(str(case), name).ranks[rank]
        ids = tensors.get("row_ids")
        if ids is None:
            counts = tensors["expert_num_tokens"].tolist()
            places = [(e, n) for e, count in enumerate(counts) for n in range(count)]
            ids = torch.tensor(case.world.grid.local(rank)).repeat_interleave(torch.tensor(counts))[:, None]
        else:
            places = [(n, 0) for n in range(len(ids))]
        operand = received_operand(view, tensors, places)
        assert not check_names(rank, triples_of(at[rank]), sign_identities(operand, ranks), ids)
        if operand.quantiser.by_token and len(places) > 1:
            moved = replace(operand, s=operand.s.roll(1, 0))
            other = (operand.s != moved.s).any(dim=1)
            assert bool((sign_identities(moved, ranks)[other] == -1).all())
            torn = operand.q.clone()
            torn[0, 33:] = -torn[0, 33:]
            assert sign_identities(replace(operand, q=torn), ranks)[0].tolist() == [-1, -1]


ALARMS = {
    "gate and up both 0, their roundings multiplied": "T=8,H=192,I=320,E=8,K=6,dtype=fp32,scheme=int4_w4a16_zp_g64,"
    "act=silu:limit=1,placement=round_robin,values=int,ranks=4,seed=203",
    "h leaves fp16's range before it is quantised": "T=16,H=50,I=50,E=17,K=8,dtype=fp16,scheme=fp8_block,act=gelu,"
    "values=groups,routing=tile,ranks=16,spread=empty,seed=245",
}


@pytest.mark.parametrize("reason", ALARMS)
def test_random_worlds_that_once_raised_a_false_alarm(reason: str) -> None:
    for name in ("eager-alltoall", "eager-alltoall-overlapped"):
        (shown,) = simulate(PAIRS[name], parse_case(ALARMS[reason]))
        assert not findings(expectation(ALARMS[reason], name), shown)


def test_one_rank_with_another_scale_or_scheme_is_told_to_all() -> None:
    """One clear message on every rank, before anything is exchanged."""

    def other_scale(inputs: Inputs) -> Inputs:
        assert inputs.a1_scale is not None
        return inputs.map({"a1_scale": inputs.a1_scale * 2})

    for name in PAIRS:
        case = parse_case(line_for(name, 2, sizes="T=4,H=64,I=64,E=4,K=2,scheme=fp8_tensor_static"))
        good, bad = make_world_inputs(case)
        with pytest.raises(ContractError, match=r"a1_scale: rank 0 has 0.13.*, rank 1 has 0.27"):
            simulate(PAIRS[name], case, [[good, other_scale(bad)]])
        with pytest.raises(ContractError, match="a1_scale is None, must be"):
            simulate(PAIRS[name], case, [[good, replace(bad, a1_scale=None)]])


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)
