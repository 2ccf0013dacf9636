"""A team's own check against the catalogue: blind ones are told so."""

from __future__ import annotations

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults import CATALOGUE, Pipeline, ask, usual
from moeproof.harness.faults.ask import Layer
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome

LINES = (
    "T=33,H=104,I=72,E=8,K=2,routing=minus1,seed=1",
    "T=17,H=40,I=50,E=12,K=10,seed=2",
    "T=33,H=104,I=72,E=8,K=2,routing=hot,seed=3",
)


def shape_only(moe: Layer) -> bool:
    """A check that any layer passes."""
    i = make_inputs(parse_case(LINES[0]), "cpu")
    return moe(i.hidden_states, i.w1, i.w2, i.topk_weights, i.topk_ids).shape == i.hidden_states.shape


def ours(moe: Layer) -> bool:
    return all(judge(moe, parse_case(line), "cpu").outcome is Outcome.PASS for line in LINES)


def test_the_healthy_layer_passes_our_check() -> None:
    assert ours(usual(Pipeline()))


def test_a_blind_check_lets_everything_through_and_ours_does_not() -> None:
    some = [f for f in CATALOGUE if f.id in ("P22", "P51", "P65", "P66", "P67", "P68", "P19")]
    blind = {a.id: a for a in ask(shape_only, some)}
    sharp = {a.id: a for a in ask(ours, some)}

    assert not any(a.caught for a in blind.values())
    assert {name for name, a in sharp.items() if a.caught} == {"P22", "P51", "P65", "P66", "P67", "P68"}
    assert str(sharp["P19"]) == "P19 dispatch.minus_one_wraps: never triggered", "there is no expert map in these cases"
    assert str(blind["P51"]) == "P51 act.halves_swapped: let through"


def test_dtypes_of_the_usual_signature() -> None:
    x = torch.ones(2, 8)
    w1, w2 = torch.ones(4, 8, 8), torch.ones(4, 8, 4)
    out = usual(Pipeline())(x, w1, w2, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))

    assert out.dtype == torch.float32 and bool((out == out[0, 0]).all())
