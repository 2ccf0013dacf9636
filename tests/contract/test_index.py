"""Every line of the contract has a test that carries its id in its name."""

import re
from pathlib import Path

import pytest

NAMES = [
    name
    for path in sorted(Path(__file__).parent.glob("test_*.py"))
    for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
]
DECISIONS = (
    "accumulation",
    "ties",
    "nan_inf",
    "renormalisation",
    "minus_one",
    "duplicate",
    "padding",
    "weights",
    "gate_up_packing",
    "strided",
    "determinism",
    "empty",
    "workspaces",
    "wrong_shapes",
)
"""Rows of the decisions table; inputs and expert_num_tokens are S06/S22 and S09."""
DIVERGENCES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 16)
"""F13, F15 and F17 are about quantisation and other people's transports; F14 is the packing test of apply."""


@pytest.mark.parametrize("line", [f"s{n:02}" for n in range(1, 26)])
def test_every_line_of_the_seed_has_a_test(line: str) -> None:
    assert any(f"_{line}_" in name for name in NAMES)


@pytest.mark.parametrize("decision", DECISIONS)
def test_every_decision_has_a_test(decision: str) -> None:
    assert any(f"decision_{decision}" in name for name in NAMES)


@pytest.mark.parametrize("number", DIVERGENCES)
def test_every_divergence_has_a_test(number: int) -> None:
    assert any(f"_f{number:02}_" in name for name in NAMES)
