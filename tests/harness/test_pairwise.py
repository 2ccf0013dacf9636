"""Every two values that can go together do so in some case of the full tier; those that cannot are known, with their rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from moeproof.harness.cases import axes
from moeproof.harness.cases.axes import AXES, DEFAULTS, build, covering, possible
from moeproof.harness.cases.case import SATURATING, parse_case
from moeproof.harness.cases.pairwise import Pair, Row, cover, pairs, pairs_of
from moeproof.harness.cases.tiers import cases_of
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.router import Router


@pytest.fixture(scope="module")
def array() -> tuple[list[Row], list[Pair]]:
    return cover(AXES, possible)


def test_every_possible_pair_is_covered(array: tuple[list[Row], list[Pair]]) -> None:
    rows, hopeless = array
    covered = set().union(*(pairs_of(row, AXES) for row in rows))

    assert hopeless == []
    assert set(pairs(AXES, possible)) - covered == set()
    assert len(pairs(AXES, possible)) > 6500
    assert len(rows) < 300


def _act(name: object) -> Activation:
    return Activation.parse(str(name))


def _router(name: object) -> Router:
    return Router.parse(str(name))


def _saturates(act: object) -> bool:
    return _act(act).name in (*SATURATING, "relu_no_mul") and not _act(act).limit


RULES: dict[tuple[str, str], Callable[..., bool]] = {
    ("E", "K"): lambda E, K: K > E + 4,  # zero experts add 4; a table may repeat, see below
    ("K", "extra"): lambda K, extra: extra == "weight_on_input" and K > 1,
    ("values", "act"): lambda values, act: (
        (values in ("sat", "tagged") and not _saturates(act))
        or (values == "clamp" and not _act(act).limit)
        or (values == "tail" and not _act(act).name.startswith("gelu"))
    ),
    ("values", "K"): lambda values, K: values == "cancel" and K < 2,
    ("values", "E"): lambda values, E: values == "cancel" and E < 2,
    ("extra", "also"): lambda extra, also: also == "double" and extra in ("weight_on_input", "shared"),
    ("routing", "logits"): lambda routing, logits: routing == "router" and logits == "deep",
    ("ranks", "also"): lambda ranks, also: also == "relabel" and ranks != "1",
}
"""What excludes what, written from the contract and not from the code that decides it."""


def test_pairs_left_out_are_those_that_a_rule_excludes() -> None:
    """Where a rule speaks about two axes, it and the code agree on every pair; all other axes go with everything, but for
    the few that need enough experts."""
    for (a, b), excluded in RULES.items():
        for x in AXES[a]:
            for y in AXES[b]:
                if (a, b) == ("E", "K"):
                    # Beyond E + 4 only a token-id table names so many slots.
                    assert possible({a: x, b: y, "router": "softmax:bias:zero_experts=4:scale=6"}) == (not excluded(x, y)), (
                        x,
                        y,
                    )
                    continue
                assert possible({a: x, b: y}) == (not excluded(x, y)), (a, x, b, y)


def test_free_axes_go_with_everything() -> None:
    free = [axis for axis in AXES if axis not in axes.CONSTRAINED]
    assert free == ["T", "H", "I", "memory", "layout", "dtype"]
    for axis in free:
        for value in AXES[axis]:
            build(DEFAULTS | {axis: value})


def test_the_cover_is_deterministic_and_reads_back(array: tuple[list[Row], list[Pair]]) -> None:
    rows, _ = array
    assert [build(row, seed) for seed, row in enumerate(rows)] == list(covering())
    assert all(parse_case(str(case)) == case for case in covering())


def test_no_two_sizes_agree() -> None:
    """Equal sizes hide a shape that is read from the wrong dim."""
    assert not set(AXES["E"]) & set(AXES["H"])
    assert not set(AXES["H"]) & set(AXES["I"])
    assert not set(AXES["T"]) & set(AXES["H"])


def test_the_full_tier_holds_the_cover_and_the_sweep_is_its_own() -> None:
    assert set(covering()) <= set(cases_of("full"))
    swept = [case for case in cases_of("sweep") if case.values == "sweep"]
    assert {case.problem.act.name for case in swept} == {_act(a).name for a in AXES["act"]}
    assert all(case.problem.T * case.problem.I == 2**17 for case in swept)


def test_a_small_array_by_hand() -> None:
    """Three axes of two values: four rows cover all twelve pairs."""
    small = {"a": (0, 1), "b": (0, 1), "c": (0, 1)}
    rows, hopeless = cover(small, lambda row: True)
    assert hopeless == []
    assert len(rows) in (4, 5)

    rows, hopeless = cover(small, lambda row: sum(map(int, row.values())) < 2)  # type: ignore[call-overload]
    assert hopeless == []
    assert all(sum(row.values()) < 2 for row in rows)  # type: ignore[arg-type]
