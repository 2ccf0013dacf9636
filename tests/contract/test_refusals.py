"""Impossible problems, routers, activations and cases cannot be built; the message names field, value and rule."""

from collections.abc import Callable

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.reference.contract import (
    Activation,
    Candidate,
    Claims,
    ContractError,
    Pair,
    Problem,
    Router,
    expert_map,
    local_experts,
)

BASE = {"T": 5, "H": 20, "I": 12, "E": 7, "K": 3}


def problem(**fields: object) -> Callable[[], Problem]:
    return lambda: Problem(**{**BASE, **fields})  # type: ignore[arg-type]


PROBLEMS = {
    "T=-1 must be an int": problem(T=-1),
    "H=0 must be an int >= 1": problem(H=0),
    "T=True must be an int": problem(T=True),
    "E=2.0 must be": problem(E=2.0),
    "dtype 'fp8' is not known": problem(dtype="fp8"),
    "scheme 'int3'": problem(scheme="int3"),
    "layout 'rows'": problem(layout="rows"),
    "storage 'NN'": problem(storage="NN"),
    "placement 'random'": problem(placement="random"),
    "K=8 slots per token but only 7 experts": problem(K=8),
    "weight_on_input with K=3": problem(weight_on_input=True),
    "latent_norm needs latent": problem(latent_norm=True),
    "shared_gate needs shared": problem(shared_gate=True),
    "capacity belongs to layout=batched": problem(capacity=4),
    "ep_rank=2 is not in": problem(ep=2, ep_rank=2),
    "ep=8 ranks share 7 experts": problem(ep=8),
    "inplace with a latent": problem(inplace=True, latent=4),
}
ROUTERS = {
    "router score 'argmax'": lambda: Router("argmax"),
    "router renorm 'max'": lambda: Router(renorm="max"),
    "needs a value > 0": lambda: Router(renorm="eps"),
    "takes no value": lambda: Router(renorm="sum", renorm_value=1.0),
    "keep must be <= groups": lambda: Router(groups=2, keep=3),
    "must not be negative": lambda: Router(softcap=-1.0),
    "share the ids after E": lambda: Router(zero_experts=1, fused_shared=1),
    "sparsemixer takes no bias": lambda: Router("sparsemixer", bias=True),
    "softmax_topk selects by logit": lambda: Router("softmax_topk", bias=True),
    "router option 'top3' is not known": lambda: Router.parse("sigmoid:top3"),
    "not a number": lambda: Router.parse("sigmoid:scale=big"),
}
ACTIVATIONS = {
    "activation 'relu2' is refused": lambda: Activation("relu2"),
    "activation 'swish' is not known": lambda: Activation("swish"),
    "takes no alpha": lambda: Activation("gelu", alpha=1.0),
    "needs limit": lambda: Activation("swigluoai_uninterleave"),
    "needs beta": lambda: Activation("situ"),
    "must not be negative ": lambda: Activation("silu", limit=-7.0),
    "no halves to interleave": lambda: Activation("silu_no_mul", interleaved=True),
    "option 'gamma=2' is not known": lambda: Activation.parse("silu:gamma=2"),
}
CASES = {
    "'T' is not key=value": lambda: parse_case("T,H=4"),
    "lacks I, E, K": lambda: parse_case("T=5,H=20"),
    "given twice": lambda: parse_case("T=5,T=6,H=20,I=12,E=7,K=3"),
    "case key 'X' is not known": lambda: parse_case("X=1,T=5,H=20,I=12,E=7,K=3"),
    "E='seven' is not a": lambda: parse_case("T=5,H=20,I=12,E=seven,K=3"),
    "routing 'best'": lambda: parse_case("T=5,H=20,I=12,E=7,K=3,routing=best"),
    "seed='-1'": lambda: parse_case("T=5,H=20,I=12,E=7,K=3,seed=-1"),
    "is not 0 or 1": lambda: parse_case("T=5,H=20,I=12,E=7,K=3,inplace=yes"),
}
NOUNS = {
    "candidate name 'a b'": lambda: Candidate("a b", lambda inputs: inputs.hidden_states),
    "shows no tensor": lambda: Candidate("a", lambda inputs: inputs.hidden_states, shows=()),
    "tensor shown by candidate a 'z'": lambda: Candidate("a", lambda inputs: inputs.hidden_states, shows=("z",)),
    "claim accumulate 'fp8'": lambda: Claims(accumulate="fp8"),
    "claim deterministic": lambda: Claims(deterministic="maybe"),
    "layout of pair p": lambda: Pair("p", lambda i: None, lambda i: None, layout="rows"),  # type: ignore[arg-type,return-value]
    "placement 'any'": lambda: local_experts(7, 2, 0, "any"),
    "rank 2 is not in": lambda: expert_map(7, 2, 2),
}


@pytest.mark.parametrize("named", [*PROBLEMS, *ROUTERS, *ACTIVATIONS, *CASES, *NOUNS])
def test_decision_wrong_shapes_impossible_nouns_are_refused_with_field_and_rule(named: str) -> None:
    build = (PROBLEMS | ROUTERS | ACTIVATIONS | CASES | NOUNS)[named]

    with pytest.raises(ContractError) as refused:
        build()

    assert named.strip() in str(refused.value)


def test_s17_f07_remainder_experts_go_to_the_first_ranks() -> None:
    assert [len(local_experts(10, 4, r)) for r in range(4)] == [3, 3, 2, 2]
    assert [local_experts(10, 4, r, "round_robin") for r in (0, 3)] == [[0, 4, 8], [3, 7]]


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_s17_maps_of_all_ranks_hold_every_expert_once(placement: str) -> None:
    maps = [expert_map(10, 4, rank, placement) for rank in range(4)]
    for expert in range(10):
        local = [int(m[expert]) for m in maps if m is not None]
        assert sum(i >= 0 for i in local) == 1
    for rank, m in enumerate(maps):
        assert m is not None
        held = local_experts(10, 4, rank, placement)
        assert [int(m[e]) for e in held] == list(range(len(held)))


def test_s17_a_single_rank_needs_no_map() -> None:
    assert expert_map(10, 1, 0) is None


@pytest.mark.parametrize("text", ["silu:limit=7", "situ:beta=4:linear_beta=25", "swigluoai:packed", "silu:interleaved"])
def test_s15_activation_text_parses_back(text: str) -> None:
    assert str(Activation.parse(text)) == text


def test_f12_router_text_parses_back() -> None:
    text = "sigmoid:bias:groups=8/4:top2:renorm=eps/1e-20:scale=2.5"

    assert str(Router.parse(text)) == text
