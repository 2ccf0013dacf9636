"""transformers' own MoE blocks, run here in float32, against the oracle: every family, input variant and misreading."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from moeproof.reference.contract import Claims
from moeproof.reference.oracle import chain

pytest.importorskip("transformers", reason="the outside witness: pip install 'moeproof[models]'")

from .agreement import compare, measure, routed
from .build import TINY, VARIANTS, Dims, Family, block_of, hidden, witness_of
from .misread import EQUIVALENT, MISREADINGS, Misreading, for_problem
from .record import stored
from .table import FAMILIES, SMOKE
from .witness import Witness, load

SIZES = Dims()
CLEAR = 0.9
"""Share of rows that must be decided beyond float32's doubt, or the comparison is about nothing."""

SILENT = {"dbrx": "its router returns logits", "llama4": "dense scores", "deepseek_v4_hash": "a table's ids"}
"""Families whose router module hands out no choice of experts; their blocks are compared end to end only."""


def has(family: Family, variant: str) -> bool:
    if variant == "negative":
        return bool(family.bias_path)
    return variant != "tail" or family.act.startswith("gelu")


@cache
def seen(name: str, variant: str) -> Witness:
    return witness_of((FAMILIES | SMOKE)[name], SIZES, variant)


CASES = [(name, variant) for name, family in FAMILIES.items() for variant in VARIANTS if has(family, variant)]
WRONG = [(name, m) for name, family in FAMILIES.items() for m in for_problem(family.problem(SIZES))]
SAME = [(name, m) for name, family in FAMILIES.items() for m in for_problem(family.problem(SIZES), EQUIVALENT)]


def _id(value: object) -> str:
    return value.name.replace(" ", "-") if isinstance(value, Misreading) else str(value)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_block_agrees_with_the_oracle(name: str, variant: str) -> None:
    agreement = compare(seen(name, variant))

    assert agreement.holds, agreement
    assert agreement.rows >= CLEAR * agreement.tokens
    assert agreement.tokens == {"one": 1, "none": 0}.get(variant, SIZES.T)


@pytest.mark.parametrize("name", SMOKE)
def test_other_names_of_the_same_semantics_agree(name: str) -> None:
    agreement = compare(seen(name, "plain"))

    assert agreement.holds, agreement
    assert agreement.rows >= CLEAR * agreement.tokens


@pytest.mark.parametrize(("name", "wrong"), WRONG, ids=_id)
def test_wrong_reading_is_caught(name: str, wrong: Misreading) -> None:
    witness = seen(name, wrong.variant)

    agreement = compare(witness, reading=wrong.read(witness))

    assert not agreement.holds, f"'{wrong.name}' escaped: {agreement}"


@pytest.mark.parametrize(("name", "same"), SAME, ids=_id)
def test_equivalent_reading_raises_no_alarm(name: str, same: Misreading) -> None:
    witness = seen(name, same.variant)

    agreement = compare(witness, reading=same.read(witness))

    assert agreement.holds, agreement


def test_every_family_has_several_misreadings_and_every_misreading_a_family() -> None:
    for name in FAMILIES:
        assert len([m for n, m in WRONG if n == name]) >= 3
    assert {m.name for _, m in WRONG} == {m.name for m in MISREADINGS}
    assert {m.name for _, m in SAME} == {m.name for m in EQUIVALENT}


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in SILENT])
def test_oracle_routes_as_the_block_does(name: str) -> None:
    """The block's own choice of experts, where its router hands it out: the same set in every clear row."""
    family, witness = FAMILIES[name], seen(name, "plain")
    router = block_of(family, SIZES).get_submodule(family.router_path)
    x = hidden(family, family.dims(SIZES))
    with torch.no_grad():
        arguments = (x, witness.inputs.correction_bias) if family.bias_path.startswith("e_score") else (x,)
        _, weights, ids = router(*arguments)
    ours = routed(witness)
    order, want = ids.sort(dim=1), ours.selection.ids.sort(dim=1)
    rows = ours.clear

    assert torch.equal(order.values[rows], want.values[rows])
    got = weights.double().gather(1, order.indices)[rows]
    wanted = ours.selection.weights.gather(1, want.indices)[rows]
    allowed = ours.weight_error.gather(1, want.indices)[rows]
    assert bool(((got - wanted).abs() <= allowed).all())


def test_tokens_near_a_tie_are_left_out() -> None:
    """Two experts with one router row tie in every token that is routed to either: such a row proves nothing."""
    witness = seen("mixtral", "plain")
    twin = witness.router_w.clone()
    twin[1] = twin[0]
    tied = dataclasses.replace(witness, router_w=twin)
    clear, ids = routed(tied).clear, routed(tied).selection.ids
    one_of_two = ((ids == 0) | (ids == 1)).sum(dim=1) == 1

    assert bool(one_of_two.any())
    assert not bool(clear[one_of_two].any())
    assert bool(clear[~one_of_two].any())


@pytest.mark.parametrize("path", stored(), ids=lambda p: p.stem)
def test_stored_files_are_what_this_transformers_gives(path: Path) -> None:
    """Same weights to the bit; same output within the oracle's bound (BLAS may sum in another order)."""
    old = load(path)
    new = witness_of(FAMILIES[old.meta["family"]], TINY, old.meta["variant"])

    assert all(torch.equal(dict(old.inputs.tensors())[n], t) for n, t in new.inputs.tensors())
    assert compare(dataclasses.replace(old, out=new.out)).holds


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v4", "nemotron_h", "gemma4"])
def test_bf16_experts_agree_given_the_routing(name: str) -> None:
    """In bf16 a block may choose other experts than a float64 router, so its experts are judged given its own choice."""
    family = FAMILIES[name]
    block = block_of(family, SIZES, torch.bfloat16)
    x = hidden(family, family.dims(SIZES)).bfloat16()
    with torch.no_grad():
        _, weights, ids = block.get_submodule(family.router_path)(x)
        answer = block.get_submodule("experts")(x, ids, weights)
    experts = seen(name, "plain").with_problem(dtype="bf16", shared=0, shared_gate=False).inputs
    low: dict[str, Any] = {n: t.bfloat16() for n, t in experts.tensors() if n in ("w1", "w2", "b1", "b2")}
    inputs = dataclasses.replace(experts, **low, hidden_states=x, topk_ids=ids.int(), topk_weights=weights.float())
    out = chain(inputs, Claims(combine="dtype", activation="dtype"))["out"]
    assert out.bound is not None

    agreement = measure(answer, out.value, out.bound, torch.ones(SIZES.T, dtype=torch.bool))

    assert agreement.holds, agreement
