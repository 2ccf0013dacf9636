"""`moeproof faults`: its JSON, its exit codes, its page; and the public rules beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moeproof.harness import cli
from moeproof.harness.faults.catalogue import by_id
from moeproof.harness.faults.rules import RULES
from moeproof.harness.faults.suites import SUITES, make

KEYS = "planted triggered caught right_stage right_place twins_alarmed healthy_checks false_alarms seconds"


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["moeproof", "faults", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_one_class_as_json_and_as_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = _run(monkeypatch, "--class", "P67", "--class", "P15", "--json", "--jobs", "1", "--output", str(tmp_path))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    assert code == 0
    assert set(lines[-1]) == set(KEYS.split())
    assert (lines[-1]["planted"], lines[-1]["caught"], lines[-1]["right_stage"], lines[-1]["twins_alarmed"]) == (2, 2, 2, 0)
    assert lines[0]["id"] == "P67" and lines[0]["finding"].startswith("COMBINE out")
    shrunk = {line["shrunk"]: line for line in lines if "shrunk" in line}
    assert shrunk["P67"]["tokens"] == 1 and shrunk["P15"]["scheme"] == "fp8_block"
    page = (tmp_path / "faults.md").read_text(encoding="utf-8")
    assert "| P67 unpermute.weight_slot_mismatch |" in page
    written = json.loads((tmp_path / "results" / "faults-cpu.json").read_text(encoding="utf-8"))
    assert written["not_planted"] == {} and written["default_tier"]["caught"] == 2
    assert {h["scheme"] for h in written["hunts"] if h["id"] == "P15"} == set().union(*by_id("P15").schemes.values())


def test_an_unknown_class_gets_one_clear_message(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(monkeypatch, "--class", "P0") == 2
    assert "fault class 'P0' is not known" in capsys.readouterr().err


@pytest.mark.parametrize("rule", RULES.values(), ids=lambda r: r.name)
def test_a_rule_accepts_the_reference_and_rejects_the_negated_one(rule: object) -> None:
    want = torch.linspace(-3, 3, 4096, dtype=torch.float64).view(32, 128)

    assert rule.accept(want, want, torch.bfloat16)  # type: ignore[attr-defined]
    assert not rule.accept(-want, want, torch.bfloat16)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "name",
    "vLLM SGLang FlashInfer DeepGEMM DeepEP Liger triton_kernels TransformerEngine torch.testing".split(),  # noqa: SIM905
)
def test_every_named_suite_has_a_rule_and_a_recipe_of_its_own(name: str) -> None:
    """Side by side on our inputs, and on theirs; quantised where their suite is."""
    rules, recipes = (
        {r.name for r in RULES.values() if r.name.startswith(name)},
        [s for s in SUITES if s.name.startswith(name)],
    )
    table = json.loads((Path(__file__).parents[2] / "docs" / "results" / "faults-cpu.json").read_text(encoding="utf-8"))

    assert rules and recipes and all(s.rule in RULES for s in recipes)
    assert rules <= {row["name"] for row in table["our_inputs"]}
    assert {s.name for s in recipes} <= {row["name"] for row in table["their_recipes"]}


def test_rules_have_the_blind_spots_that_were_measured() -> None:
    """docs/peers.md: a flat tolerance above the output accepts zeros, similarity accepts one bad token among many."""
    want = torch.randn(4096, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one_bad = want.clone()
    one_bad[7] = want[8]

    assert RULES["vLLM fused_moe"].accept(0 * want, 1e-3 * want, torch.bfloat16)
    assert RULES["DeepGEMM fp8"].accept(one_bad, want, torch.bfloat16)
    assert not RULES["triton_kernels"].accept(one_bad, want, torch.bfloat16)


@pytest.mark.parametrize("suite", [s for s in SUITES if s.E <= 32 and s.scheme == "none"], ids=lambda s: s.name)
def test_a_recipe_has_the_magnitudes_it_is_known_by(suite: object) -> None:
    inputs = make(suite, 1)  # type: ignore[arg-type]
    gate = inputs.hidden_states.double() @ inputs.w1[0].double().T

    assert float(gate.square().mean().sqrt()) == pytest.approx(suite.pre, rel=0.2)  # type: ignore[attr-defined]
