"""The oracle against stored outputs of transformers' blocks. Needs neither transformers nor a network."""

from __future__ import annotations

from pathlib import Path

import pytest

from .agreement import compare, expected, measure, routed
from .misread import EQUIVALENT, for_problem
from .record import GOLDEN, LIMIT, stored, variants
from .table import FAMILIES
from .witness import load

FILES = pytest.mark.parametrize("path", stored(), ids=lambda p: p.stem)


def test_every_family_is_stored() -> None:
    """A family without a file would be checked only where transformers is installed."""
    wanted = {f"{name}-{variant}" for name in FAMILIES for variant in variants(name)}

    assert {path.stem for path in stored()} == wanted


@FILES
def test_oracle_agrees_with_the_stored_output(path: Path) -> None:
    witness = load(path)

    agreement = compare(witness)

    assert agreement.holds, f"{path.stem} (transformers {witness.meta['transformers']}): {agreement}"
    assert agreement.rows >= 0.9 * agreement.tokens


@FILES
def test_wrong_readings_of_the_stored_model_are_caught(path: Path) -> None:
    """All but those that change nothing on these few tokens, and at least six."""
    witness = load(path)
    right = routed(witness)
    value, allowed = expected(right)
    caught = 0
    for m in for_problem(witness.problem):
        if m.variant not in ("plain", witness.meta["variant"]):
            continue
        wrong, wrong_allowed = expected(m.read(witness))
        agreement = measure(witness.out, wrong, wrong_allowed, right.clear)
        same = bool(((wrong - value).abs() <= allowed).all())

        assert same or not agreement.holds, f"'{m.name}' escaped: {agreement}"
        caught += not agreement.holds

    assert caught >= 6


@FILES
def test_equivalent_readings_raise_no_alarm(path: Path) -> None:
    witness = load(path)
    for m in for_problem(witness.problem, EQUIVALENT):
        agreement = compare(witness, reading=m.read(witness))

        assert agreement.holds, f"'{m.name}' is the same function: {agreement}"


def test_files_are_small_and_versioned() -> None:
    for path in stored():
        meta = load(path).meta

        assert path.stat().st_size <= LIMIT, path
        assert meta["transformers"] and meta["torch"] and f"{meta['family']}-{meta['variant']}" == path.stem
    assert not [p for p in GOLDEN.iterdir() if p.suffix != ".safetensors"]
