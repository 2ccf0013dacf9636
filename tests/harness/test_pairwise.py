"""Every two values that can go together do so in some stored case; those that cannot are known, with their rule."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from moeproof.harness.cases.axes import ANYWHERE, AXES, DEFAULTS, SHARES, WORLDS, build, covering, possible, row_of
from moeproof.harness.cases.case import SATURATING, parse_case
from moeproof.harness.cases.pairwise import Pair, cover, pairs_of
from moeproof.harness.cases.tiers import cases_of
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.schemes import ALL, SCHEMES


def _act(name: object) -> Activation:
    return Activation.parse(str(name))


def _router(name: object) -> Router:
    return Router.parse(str(name))


def _saturates(act: object) -> bool:
    return _act(act).name in (*SATURATING, "relu_no_mul") and not _act(act).limit


def _undivided(scheme: str, columns: int) -> bool:
    w = SCHEMES[scheme].w
    return w is not None and not w.ragged and w.group[1] != ALL and columns % w.group[1] > 0


def _own_amax(scheme: str) -> bool:
    x = SCHEMES[scheme].a1
    return x is not None and not (x.static or x.two_level)


def _powers_of_two(scheme: str) -> bool:
    w, x = SCHEMES[scheme].w, SCHEMES[scheme].a1
    return w is not None and all(q.scale == "e8m0" for q in (w, x or w))


def _groups(ranks: str) -> int:
    """How many expert-parallel groups share the experts."""
    share, world = SHARES.get(ranks, {}), WORLDS.get(ranks, {})
    extra = int(str(world.get("redundant", 0)))
    return int(str(share.get("ep", 1))) if share else int(str(world.get("ranks", 1))) // int(str(world.get("tp", 1))) - extra


REASONS: dict[tuple[str, str], tuple[Callable[..., bool], str]] = {
    ("E", "router"): (
        lambda E, r: (_router(r).groups and (E % 4 or E < 8)) or (_router(r).score == "sparsemixer" and E < 2),
        "groups of equal size, of two experts at least; two experts are selected",
    ),
    ("E", "routing"): (
        lambda E, routing: (routing == "empty" and E < 4) or (routing in ("tile", "pair") and E < 2),
        "three experts go without tokens; a pair has two",
    ),
    ("E", "values"): (lambda E, values: values == "cancel" and E < 2, "experts cancel in pairs"),
    ("E", "ranks"): (lambda E, ranks: _groups(ranks) > E, "each group of ranks holds an expert"),
    ("E", "relation"): (lambda E, relation: relation == "ranks" and E < 2, "two ranks hold two experts"),
    ("K", "router"): (lambda K, r: _router(r).score == "sparsemixer" and K != 2, "sparsemixer selects two"),
    ("K", "values"): (lambda K, values: values == "cancel" and K < 2, "slots cancel in pairs"),
    ("K", "extra"): (lambda K, extra: extra == "weight_on_input" and K > 1, "one input cannot have several weights"),
    ("router", "extra"): (
        lambda r, extra: (
            (extra == "weight_on_input" and (_router(r).score == "sparsemixer" or _router(r).fused_shared > 0))
            or (extra == "latent" and _router(r).zero_experts > 0)
        ),
        "one input cannot have several weights; an identity expert adds x, which is wider than the latent sum",
    ),
    ("router", "ranks"): (
        lambda r, ranks: ranks == "3 redundant" and (_router(r).zero_experts or _router(r).fused_shared),
        "the ids after E are the replicas'",
    ),
    ("act", "values"): (
        lambda act, values: (
            (values in ("sat", "tagged", "pin", "least") and not _saturates(act))
            or (values == "least" and not _act(act).gated)
            or (values == "clamp" and not _act(act).limit)
            or (values == "tail" and not _act(act).name.startswith("gelu"))
        ),
        "the recipe is about something that this activation has not",
    ),
    ("scheme", "values"): (
        lambda scheme, values: (
            (values == "pin" and scheme == "none")
            or (values == "codes" and not _own_amax(scheme))
            or (values == "least" and not _powers_of_two(scheme))
        ),
        "there are no scales to pin, or x has none by its own amax, or some are no powers of two",
    ),
    ("scheme", "H"): (_undivided, "groups of the scheme are never short"),
    ("scheme", "I"): (_undivided, "groups of the scheme are never short"),
    ("scheme", "extra"): (
        lambda scheme, extra: extra == "latent" and scheme != "none",
        "QUANT1 would quantise a projection that no stage shows",
    ),
    ("scheme", "relation"): (
        lambda scheme, relation: (
            relation == "split"
            and any(q is not None and not q.by_token and not q.static for q in (SCHEMES[scheme].a1, SCHEMES[scheme].a2))
        ),
        "half of the tokens have another scale",
    ),
    ("routing", "logits"): (lambda routing, logits: routing == "router" and logits == "deep", "the weights underflow"),
    ("values", "H"): (lambda values, H: values == "least" and (H < 96 or H % 32 > 0), "three whole groups of 32"),
    ("values", "I"): (
        lambda values, columns: (
            (values == "pin" and columns < 16) or (values == "least" and (columns < 96 or columns % 32 > 0))
        ),
        "16 columns hold the pinned codes; three whole groups of 32",
    ),
    ("values", "extra"): (
        lambda values, extra: (
            (extra == "weight_on_input" and values in ("cancel", "tail", "codes", "pin", "least"))
            or (extra == "latent" and values in ("codes", "pin", "least"))
        ),
        "the recipe places x itself, or needs two slots; nothing quantised has a latent width",
    ),
    ("values", "dtype"): (
        lambda values, dtype: values in ("pin", "least") and dtype == "fp16",
        "their scales leave fp16's range",
    ),
    ("extra", "ranks"): (lambda extra, ranks: extra == "latent" and " tp" in ranks, "projections lie outside the shards"),
    ("extra", "relation"): (
        lambda extra, relation: relation == "double" and extra in ("weight_on_input", "shared", "shared_gate"),
        "the result is not linear in the weights",
    ),
    ("ranks", "relation"): (
        lambda ranks, relation: (
            (relation == "ranks" and (ranks in SHARES or ranks in ("3 redundant", "4 empty tp")))
            or (relation == "relabel" and ranks in SHARES and ranks != "1")
        ),
        "tokens move between ranks that each have their own; every expert is here",
    ),
    ("ranks", "history"): (lambda ranks, history: ranks in WORLDS and history == "stream", "judged on one rank"),
    ("relation", "history"): (lambda relation, history: (relation, history) == ("ranks", "stream"), "judged on one rank"),
}
"""What excludes what, and why, written from the contract and not from the code that decides it."""


def _every_pair() -> list[Pair]:
    return [((a, x), (b, y)) for a, b in itertools.combinations(AXES, 2) for x in AXES[a] for y in AXES[b]]


def _excluded(pair: Pair) -> bool:
    (a, x), (b, y) = pair
    return (a, b) in REASONS and bool(REASONS[a, b][0](x, y))


@pytest.fixture(scope="module")
def covered() -> set[Pair]:
    """Read off the stored cases themselves."""
    return set().union(*(pairs_of(row_of(case), AXES) for case in covering()))


def test_every_pair_is_in_some_case_or_excluded_for_a_reason(covered: set[Pair]) -> None:
    every = _every_pair()
    lacking = [pair for pair in every if pair not in covered]

    assert len(every) > 14_000
    assert lacking == [pair for pair in every if _excluded(pair)], "the axes have changed? python ci/cover.py finds new cases"
    assert not any(possible(dict(pair)) for pair in lacking)


def test_pairs_that_need_no_gpu_and_no_ranks_are_in_cases_that_need_neither() -> None:
    here = [row for row in map(row_of, covering()) if all(row[axis] in values for axis, values in ANYWHERE.items())]
    covered = set().union(*(pairs_of(row, ANYWHERE) for row in here))
    wanted = [pair for pair in _every_pair() if all(value in ANYWHERE[axis] for axis, value in pair) and not _excluded(pair)]

    assert set(wanted) <= covered
    assert len(here) < 650 and len(covering()) < 950


def test_each_axis_has_what_the_catalogue_asks_of_it() -> None:
    """Boundaries of tiles, experts beyond a warp and no power of two, every scheme, several ranks, every history."""
    assert {0, 1, 2, 3, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 130} == set(AXES["T"])
    assert max(map(int, AXES["E"])) > 128 and {1, 2, 5, 12, 60} <= set(AXES["E"])  # type: ignore[call-overload]
    assert {1, 16} <= set(AXES["K"]) and set(AXES["scheme"]) == set(SCHEMES)
    assert {row_of(case)["history"] for case in covering()} == {"none", "interleave", "stream", "graph"}
    assert {case.ranks for case in covering()} == {1, 2, 3, 4, 5, 8}
    assert {(case.tp, case.sp, case.redundant > 0) for case in covering()} >= {(1, 0, True), (2, 0, False), (2, 1, False)}


def test_no_two_dimensions_of_a_case_are_equal() -> None:
    """Equal sizes hide a shape that is read from the wrong dim. Up to 3 a size is a boundary in itself, in whatever dim."""
    for case in (*covering(), *cases_of("default")):
        p = case.problem
        doubled = [p.N, 2 * p.shared] if p.act.gated else []
        sizes = [p.T, p.H, p.I, p.E, p.K, p.latent, p.shared, *doubled]
        large = [size for size in sizes if size > 3]
        assert len(set(large)) == len(large), case


def test_every_value_goes_with_the_defaults_or_what_may_stand_for_them() -> None:
    for axis in AXES:
        assert all(possible({axis: value}) for value in AXES[axis]), axis
    build(DEFAULTS)


def test_the_cases_read_back_and_are_what_their_rows_build() -> None:
    for case in covering():
        assert parse_case(str(case)) == case == build(row_of(case), case.seed)
    assert len({case.seed for case in covering()}) == len(covering())


def test_the_full_tier_holds_the_cover_of_one_rank_and_the_sweep_is_its_own() -> None:
    full = cases_of("full")
    assert [case for case in covering() if case.ranks == 1] == [case for case in full if case in set(covering())]
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


def test_what_is_given_is_not_covered_again() -> None:
    small = {"a": (0, 1), "b": (0, 1)}
    rows, _ = cover(small, lambda row: True, given=[{"a": 0, "b": 0}, {"a": 1, "b": 1}, {"a": 0, "b": 1}])

    assert rows == [{"a": 1, "b": 0}]
