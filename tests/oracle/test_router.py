"""ROUTE: the oracle against a scalar reading of every rule, and its margins and errors against plain float32."""

from __future__ import annotations

import math

import pytest
import torch

from moeproof.reference.contract import Inputs, Problem, Router
from moeproof.reference.contract.schemes import FORMATS
from moeproof.reference.oracle import Selection, route
from moeproof.reference.oracle.rounding import ulp

from . import scalar_router
from .router_float32 import route32

Tensor = torch.Tensor
INF, NAN = math.inf, math.nan

RULES = (
    "softmax",
    "softmax:renorm=sum",
    "softmax:bias",
    "softmax_topk",
    "softmax_topk:renorm=sum:scale=2",
    "sigmoid",
    "sigmoid:renorm=sum",
    "sigmoid:bias:renorm=eps/1e-20:scale=2.5",
    "sigmoid:renorm=floor/0.5",
    "sigmoid:renorm=lp/2",
    "sigmoid:renorm=lp/1",
    "softmax:bias:renorm=floor/1e-12",
    "sqrtsoftplus",
    "sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
    "softmax:multiplier=0.3",
    "softmax:multiplier=0.5:softcap=30",
    "sigmoid:softcap=3",
    "softmax_topk:multiplier=0.7:softcap=5",
    "softmax:renorm=sum:expert_scale",
    "softmax:expert_scale:scale=-2",
    "sigmoid:groups=4/2",
    "sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "softmax:groups=4/1:rejected=zero:scale=16",
    "sigmoid:bias:groups=4/2:top2:rejected=zero",
    "softmax:groups=4/4:top2",
    "softmax:groups=2/0",
    "sigmoid:bias:groups=4/0:renorm=sum",
    "sparsemixer",
    "sparsemixer:jitter_eps=0.2",
    "sparsemixer:multiplier=0.3:softcap=30:expert_scale",
    "sparsemixer:fused_shared=1",
    "sqrtsoftplus:table:renorm=eps/1e-20",
    "softmax_topk:table",
    "sigmoid:bias:table:expert_scale",
    "sigmoid:renorm=sum:fused_shared=2:scale=2.5",
    "softmax:bias:zero_experts=4:scale=6",
    "softmax:zero_experts=4:expert_scale",
    "sigmoid:zero_experts=4:groups=4/2:renorm=sum",
)
E = 8
FP32 = FORMATS["fp32"]


def slots(text: str) -> int:
    return 2 if "sparsemixer" in text or "4/1" in text else 4


def given(text: str, logits: Tensor, K: int | None = None, experts: int = E) -> Inputs:
    """The router's inputs; biases below zero for most experts, so that a group rejected with 0 would win."""
    router = Router.parse(text)
    rng = torch.Generator().manual_seed(7)
    T, width = logits.shape
    K = K or slots(text)
    p = Problem(T=T, H=1, I=1, E=experts, K=K, router=router)
    assert width == p.routed_ids
    return Inputs(
        problem=p,
        hidden_states=torch.zeros(T, 1, dtype=torch.bfloat16),
        topk_ids=torch.zeros(T, p.slots, dtype=torch.int32),
        topk_weights=torch.zeros(T, p.slots),
        w1=torch.zeros(p.weight_experts, 2, 1, dtype=torch.bfloat16),
        w2=torch.zeros(p.weight_experts, 1, 1, dtype=torch.bfloat16),
        logits=logits.float(),
        correction_bias=torch.randn(width, generator=rng) * 0.3 - 0.6 if router.bias else None,
        expert_scale=torch.rand(experts, generator=rng) + 0.5 if router.expert_scale else None,
        table_ids=torch.randint(0, width, (T, K), generator=rng, dtype=torch.int32) if router.table else None,
    )


def width(text: str) -> int:
    return E + Router.parse(text).zero_experts


def by_hand(inputs: Inputs) -> tuple[list[list[int]], list[list[float]]]:
    p = inputs.problem

    def row_of(t: Tensor | None) -> list[float] | None:
        return None if t is None else t.tolist()

    rows = [
        scalar_router.route(
            row,
            p.router,
            p.E,
            p.K,
            bias=row_of(inputs.correction_bias),
            expert_scale=row_of(inputs.expert_scale),
            table=None if inputs.table_ids is None else inputs.table_ids[t].tolist(),
        )
        for t, row in enumerate(inputs.logits.tolist())
    ]
    return [ids for ids, _ in rows], [w for _, w in rows]


def check(inputs: Inputs) -> Selection:
    """The oracle's ids are those of the scalar reading, its weights equal to 1e-12; shapes and signs are in order."""
    p = inputs.problem
    got = route(inputs)
    ids, weights = by_hand(inputs)

    assert got.ids.shape == got.weights.shape == got.error.shape == (p.T, p.slots)
    assert got.choice.shape == got.margin.shape == (p.T, p.routed_ids)
    assert got.ids.tolist() == ids
    assert torch.allclose(
        got.weights, torch.tensor(weights, dtype=torch.float64).reshape(p.T, p.slots), rtol=1e-11, atol=1e-300
    )
    assert bool((got.error >= 0).all())
    return got


def rows(kind: str, count: int, columns: int) -> Tensor:
    rng = torch.Generator().manual_seed(count)
    x = torch.randn(count, columns, generator=rng) * 2
    if kind == "ties":
        return torch.randint(-1, 2, (count, columns), generator=rng).float()
    if kind == "deep":
        return x - torch.rand(count, 1, generator=rng) * 130
    if kind == "steep":
        return x * 12
    return x


@pytest.mark.parametrize("kind", ["normal", "ties", "deep", "steep"])
@pytest.mark.parametrize("text", RULES)
def test_agrees_with_the_scalar_reading(text: str, kind: str) -> None:
    got = check(given(text, rows(kind, 40, width(text))))

    assert bool(got.defined.all())


@pytest.mark.parametrize("text", RULES)
def test_rows_with_nan_and_infinities_are_total(text: str) -> None:
    """Distinct ids in range, finite weights, other rows untouched; a row without a finite score: lowest ids, weights 0."""
    columns = width(text)
    clean = rows("normal", 12, columns)
    odd = clean.clone()
    odd[0] = NAN
    odd[1] = -INF
    odd[2, 1:] = NAN
    odd[3, :-1] = -INF
    odd[4, 3] = NAN
    odd[5, 0] = INF
    odd[6] = INF
    odd[7, 2], odd[7, 5] = INF, NAN
    got = check(given(text, odd))
    before = route(given(text, clean))
    inputs = given(text, odd)
    p = inputs.problem

    assert got.defined.tolist() == [False] * 8 + [True] * 4
    for now, then in ((got.ids, before.ids), (got.weights, before.weights), (got.error, before.error)):
        assert torch.equal(now[8:], then[8:]), "rows are independent"
    assert bool(got.weights.isfinite().all())
    assert bool(((got.ids >= 0) & (got.ids < p.routed_ids + p.router.fused_shared)).all())
    if p.router.table:
        return
    assert all(len(set(row)) == len(row) for row in got.ids.tolist())
    if not p.router.softcap:  # a soft cap makes -inf the finite score -softcap
        quota = p.router.groups and not p.router.keep
        for row in (0, 1):
            assert quota or got.ids[row, : p.K].tolist() == list(range(p.K))
            assert got.weights[row, : p.K].tolist() == [0.0] * p.K


@pytest.mark.parametrize("text", RULES)
def test_no_rows(text: str) -> None:
    got = check(given(text, torch.empty(0, width(text))))

    assert got.open_groups.shape == got.defined.shape == (0,)


@pytest.mark.parametrize("score", ["softmax", "softmax_topk", "sigmoid", "sqrtsoftplus"])
def test_one_expert_and_every_expert(score: str) -> None:
    check(given(score, rows("normal", 6, 1), K=1, experts=1))
    check(given(score, rows("ties", 6, 5), K=5, experts=5))
    check(given(f"{score}:zero_experts=3:renorm=sum", rows("normal", 6, 4), K=4, experts=1))


def test_ties_go_to_the_lowest_id() -> None:
    for text in (
        "softmax",
        "sigmoid",
        "sqrtsoftplus",
        "softmax_topk",
        "sparsemixer",
        "sigmoid:groups=4/2",
        "sigmoid:groups=4/2:top2",
    ):
        got = route(given(text, torch.zeros(3, E)))
        assert got.ids.tolist() == [list(range(slots(text)))] * 3, text


def test_the_bias_moves_the_choice_and_never_the_weight() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0]])
    inputs = given("sigmoid:bias", logits, K=2)
    bias = torch.zeros(E)
    bias[6] = 5.0
    got = route(inputs.map({"correction_bias": bias}))

    assert got.ids.tolist() == [[6, 0]]
    assert torch.allclose(got.weights, torch.sigmoid(logits.double()[:, [6, 0]]), rtol=1e-14)


def test_a_rejected_group_filled_with_zero_beats_negative_scores() -> None:
    logits = torch.tensor([[0.0, 1.0, -5.0, -5.0, -5.0, -5.0, -5.0, -5.0]])
    negative = torch.full((E,), -2.0)
    ids = [
        route(given(text, logits, K=2).map({"correction_bias": negative})).ids.tolist()
        for text in ("sigmoid:bias:groups=4/1", "sigmoid:bias:groups=4/1:rejected=zero")
    ]

    assert ids == [[[1, 0]], [[2, 3]]]


@pytest.mark.parametrize("kind", ["normal", "deep", "steep"])
@pytest.mark.parametrize("text", RULES)
def test_float32_stays_within_error_and_margin(text: str, kind: str) -> None:
    """2000 rows of plain float32 torch: scores within margin, so no clear winner is missed; weights within error."""
    inputs = given(text, rows(kind, 2000, width(text)))
    p = inputs.problem
    want = route(inputs)
    ids, weights, choice = route32(inputs)
    comparable = ~want.open_groups[:, None] & want.choice.isfinite()
    moved = torch.where(comparable, choice.double() - want.choice, 0.0).abs()
    clear = torch.where(comparable, want.margin + ulp(want.choice, FP32) / 2, 1.0)

    assert bool((moved <= clear).all()), f"score off by {float((moved / clear).max()):.3g} of its margin"
    same = (ids == want.ids).all(dim=1)
    # Deep and steep logits underflow to 0 or saturate to 1 in float32: ties, which go to the lowest id.
    assert float(same.double().mean()) > (0.99 if kind == "normal" else 0.3), "too few rows decided alike to say anything"
    allowed = want.error + ulp(want.weights.abs() + want.error, FP32) / 2
    ratio = torch.where(same[:, None], (weights.double() - want.weights).abs() / allowed, 0.0)

    assert bool(weights.isfinite().all())
    assert float(ratio.max()) <= 1, f"weight off by {float(ratio.max()):.3g} of what is allowed"
    if kind == "normal" and not p.router.fused_shared:
        assert float(ratio.max()) > 0.01, "the bound says nothing"


@pytest.mark.parametrize("text", [t for t in RULES if "=4/2" in t and "zero:" not in t + ":"])
def test_rows_whose_groups_float32_decides_otherwise_are_marked_open(text: str) -> None:
    """Logits one float32 step apart: where rounding swaps groups, open_groups must say so."""
    base = rows("ties", 2000, width(text))
    rng = torch.Generator().manual_seed(3)
    inputs = given(text, base * (1 + torch.randint(-1, 2, base.shape, generator=rng) * 2.0**-23))
    if inputs.correction_bias is not None:
        inputs = inputs.map({"correction_bias": torch.full((width(text),), -0.6)})
    want = route(inputs)
    _, _, choice = route32(inputs)
    swapped = (choice.isneginf() != want.choice.isneginf()).any(dim=1)

    assert bool(swapped.any()) and bool(want.open_groups[swapped].all())


def test_open_groups_is_false_where_groups_are_clear() -> None:
    logits = torch.tensor([[5.0, 5.0, 4.0, 4.0, -5.0, -5.0, -6.0, -6.0]])
    for text in ("sigmoid:groups=4/2", "softmax:groups=4/2:top2"):
        assert route(given(text, logits)).open_groups.tolist() == [False]
        assert route(given(text.replace("4/2", "4/4"), logits)).open_groups.tolist() == [False]


def test_sparsemixer_marks_a_mask_on_the_edge() -> None:
    """(best - x) / best of exactly 2 eps: float32 may mask the second expert or not."""
    near = torch.tensor([[1.0, 0.98, 0.2, 0.1, 0, 0, 0, 0], [1.0, 0.9, 0.2, 0.1, 0, 0, 0, 0]])

    assert route(given("sparsemixer", near)).open_groups.tolist() == [True, False]
