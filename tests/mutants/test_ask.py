"""A team's own check against the catalogue: blind ones are told so, and so are those that reject everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from moeproof.harness import cli
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults import CATALOGUE, Pipeline, ask, ask_candidates, ask_router, by_id, route_of, usual
from moeproof.harness.faults.ask import Layer, Route
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, ContractError, Router

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


def test_a_check_that_rejects_the_healthy_layer_is_refused() -> None:
    def never(moe: Layer) -> bool:
        return False

    def broken(thing: object) -> None:
        raise ValueError("no such file")

    with pytest.raises(ContractError, match="rejects the healthy layer"):
        next(ask(never))
    with pytest.raises(ContractError, match="raised ValueError: no such file"):
        next(ask_router(broken))
    with pytest.raises(ContractError, match="says nothing about faulty ones"):
        next(ask_candidates(broken))


def best_two(route: Route) -> None:
    """The usual test of a router: its own torch.topk, on logits without ties, NaN or depth."""
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    weights, ids = route(logits)
    want, chosen = logits.softmax(-1).topk(2)
    assert torch.equal(ids.long(), chosen)
    torch.testing.assert_close(weights, want / want.sum(-1, keepdim=True))


def test_a_router_check_sees_the_other_flag_and_is_told_what_it_never_tried() -> None:
    answers = {(a.id, a.variant): a for a in ask_router(best_two)}

    assert {name[0] for name in answers} >= {"P01", "P03", "P06", "P08"}
    assert {name for name, a in answers.items() if a.caught} == {("P03", "never")}
    assert str(answers["P08", "higher id"]).endswith("never triggered")


def test_a_router_with_a_bias_gets_one() -> None:
    route = route_of(Pipeline(), Router.parse("sigmoid:bias:renorm=sum"), 1)
    logits = torch.zeros(3, 4)
    weights, ids = route(logits, torch.tensor([0.0, 0.0, 2.0, 0.0]))

    assert ids.flatten().tolist() == [2, 2, 2] and weights.flatten().tolist() == [1.0] * 3


def test_a_check_of_candidates_is_asked_about_schemes_and_ranks() -> None:
    lines = (LINES[0], "T=9,H=256,I=128,E=3,K=2,scheme=mxfp8,values=groups,routing=minus1,seed=41")
    some = [by_id(name) for name in ("P13", "P72", "P92")]

    def check(candidate: Candidate) -> bool:
        outcomes = [judge(candidate, parse_case(line), "cpu").outcome for line in lines]
        return all(outcome in (Outcome.PASS, Outcome.UNSUPPORTED) for outcome in outcomes)

    answers = list(ask_candidates(check, some))

    assert {a.id for a in answers} == {"P13", "P72"}, "a graph is no call of a candidate"
    assert {a.scheme for a in answers if a.caught} == {"mxfp8", ""}
    assert all(a.caught for a in answers if a.fired)


EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "ask_faults.py"


def test_the_example_of_the_docs_is_what_the_docs_say() -> None:
    """docs/plugging-in.md quotes the example's output."""
    spec = importlib.util.spec_from_file_location(EXAMPLE.stem, EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    answers = [str(a) for a in ask(module.check_moe)]
    page = (EXAMPLE.parents[1] / "plugging-in.md").read_text(encoding="utf-8")
    quoted = [line for line in page.splitlines() if line.endswith((": let through", ": never triggered"))]

    assert len(quoted) > 3 and set(quoted) <= set(answers)


def test_the_command_asks_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["moeproof", "faults", "--ask", f"{EXAMPLE}:check_moe", "--class", "P51", "--class", "P66", "--json"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().out.splitlines()

    assert stop.value.code == 1, "something was let through"
    assert '"let_through": 1' in lines[-1] and '"never_triggered": 1' in lines[-1] and '"asked": 2' in lines[-1]
