"""The router's rows of the decisions table, in every router: ties, NaN and Inf, renormalisation, and the vocabulary."""

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_kit import DEVICE, NAN, case, every_router

from moeproof.reference.contract import Candidate, ContractError, Inputs, Problem, Router

INF = float("inf")
LARGEST = 3.4028234663852886e38


def routed(router: Candidate, inputs: Inputs) -> tuple[list[list[int]], list[list[float]]]:
    shown = router.run(inputs)
    assert isinstance(shown, Mapping)
    ids, weights = shown["topk_ids"], shown["topk_weights"]
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    assert ids.shape == weights.shape == inputs.topk_ids.shape
    return ids.tolist(), weights.tolist()


def row64(logits: list[float], r: Router, K: int, bias: list[float] | None, table: list[int] | None) -> dict[int, float]:
    """{id: weight} of one row of finite logits, in plain Python. Raises where an id would come twice."""
    x = [v * r.multiplier for v in logits]
    if r.softcap:
        x = [r.softcap * math.tanh(v / r.softcap) for v in x]
    if r.score == "sparsemixer":
        return sparsemixer64(x, r.jitter_eps)
    biggest = max(x)
    score = {
        "softmax": lambda v: math.exp(v - biggest) / sum(math.exp(o - biggest) for o in x),
        "softmax_topk": lambda v: v,
        "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v)),
        "sqrtsoftplus": lambda v: math.sqrt(max(v, 0.0) + math.log1p(math.exp(-abs(v)))),
    }[r.score]
    s = [score(v) for v in x]
    choice = [a + b for a, b in zip(s, bias, strict=True)] if bias else list(s)
    size = len(x) // r.groups if r.groups else len(x)
    members = [list(range(g, g + size)) for g in range(0, len(x), size)]

    def best(some: list[int], count: int) -> list[int]:
        return sorted(some, key=lambda i: (-choice[i], i))[:count]

    if table is not None:
        ids = table
    elif r.groups and not r.keep:
        ids = [i for m in members for i in best(m, K // r.groups)]
    else:
        if r.groups:
            counted = 2 if r.group_score == "top2" else 1
            strength = [sum(choice[i] for i in best(m, counted)) for m in members]
            kept = sorted(range(r.groups), key=lambda g: (-strength[g], g))[: r.keep]
            for g in set(range(r.groups)) - set(kept):
                for i in members[g]:
                    choice[i] = -INF if r.rejected == "neginf" else 0.0
        ids = best(list(range(len(x))), K)
    w = [s[i] for i in ids]
    if r.score == "softmax_topk":
        w = [math.exp(x[i] - max(x[j] for j in ids)) for i in ids]
        w = [v / sum(w) for v in w]
    total = sum(w)
    norm = {
        "none": 1.0,
        "sum": max(total, 1e-20),
        "eps": total + r.renorm_value,
        "floor": max(total, r.renorm_value),
        "lp": sum(v**r.renorm_value for v in w) ** (1 / r.renorm_value) if r.renorm == "lp" else 1.0,
    }[r.renorm]
    assert len(set(ids)) == K
    return {i: v / norm * r.scale for i, v in zip(ids, w, strict=True)}


def sparsemixer64(x: list[float], eps: float) -> dict[int, float]:
    out: dict[int, float] = {}
    for _ in range(2):
        left = [i for i in range(len(x)) if i not in out]
        j = min(left, key=lambda i: (-x[i], i))
        near = [i for i in left if not (x[j] - x[i]) / max(abs(x[i]), x[j]) > 2 * eps]
        out[j] = 1 / sum(math.exp(x[i] - x[j]) for i in near)
    return out


def check(router: Candidate, inputs: Inputs, rel: float = 2.0**-17) -> None:
    """Ids as sets and weights by id, against the plain loop."""
    p, r = inputs.problem, inputs.problem.router
    assert inputs.logits is not None
    bias = None if inputs.correction_bias is None else inputs.correction_bias.double().tolist()
    ids, weights = routed(router, inputs)
    for t, logits in enumerate(inputs.logits.double().tolist()):
        table = None if inputs.table_ids is None else inputs.table_ids[t].tolist()
        want = row64(logits, r, p.K, bias, table)
        if inputs.expert_scale is not None:
            want = {i: w * float(inputs.expert_scale[i]) for i, w in want.items()}
        want |= {i: 1.0 for i in range(p.E, p.weight_experts) if r.fused_shared}
        got = dict(zip(ids[t], weights[t], strict=True))
        assert got.keys() == want.keys(), f"token {t}: {sorted(got)}, want {sorted(want)}"
        for i, w in want.items():
            assert got[i] == pytest.approx(w, rel=rel, abs=2.0**-100), f"token {t}, expert {i}"


def make(text: str, **fields: Any) -> Inputs:
    """No slot of the case is routed: candidates that run the whole layer spend no time on experts."""
    logits = fields.pop("logits", None)
    inputs = case(
        values="normal", routing="none", **({"H": 8, "I": 8, "E": 8, "K": 4, "T": 6, "router": Router.parse(text)} | fields)
    )
    if logits is not None:
        inputs = inputs.map({"logits": torch.tensor(logits, dtype=torch.float32, device=DEVICE)})
    return inputs


VOCABULARY = [
    "softmax",
    "softmax:renorm=sum",
    "softmax_topk:multiplier=0.5",
    "sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "sigmoid:bias:groups=4/2:top2:rejected=zero",
    "softmax:groups=4/2:scale=16",
    "sigmoid:groups=2/0:renorm=sum",
    "sqrtsoftplus:bias:renorm=sum:scale=1.5",
    "softmax:bias:renorm=floor/1e-12",
    "softmax:renorm=lp/2:expert_scale",
    "softmax:softcap=3",
    "softmax:bias:zero_experts=3:scale=6",
    "sigmoid:renorm=sum:scale=2.5:fused_shared=2",
]


@every_router
@pytest.mark.parametrize("text", VOCABULARY)
def test_s05_every_router_of_the_vocabulary(router: Candidate, text: str) -> None:
    """Bias selects and never weighs; the scale multiplies once, with or without renormalising, and no shared expert."""
    check(router, make(text))


@every_router
@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_s05_sparsemixer(router: Candidate, eps: float) -> None:
    check(router, make(f"sparsemixer:jitter_eps={eps:g}", K=2))


@every_router
def test_s04_a_table_may_repeat_an_expert_and_weighs_by_score(router: Candidate) -> None:
    inputs = make("sigmoid:table:renorm=sum", T=2, K=3)
    inputs = inputs.map({"table_ids": torch.tensor([[2, 2, 7], [0, 1, 0]], dtype=torch.int32, device=DEVICE)})
    assert inputs.logits is not None

    ids, weights = routed(router, inputs)

    assert ids == [[2, 2, 7], [0, 1, 0]]
    scores = torch.sigmoid(inputs.logits.double().cpu())
    for t in range(2):
        s = scores[t, ids[t]]
        assert weights[t] == pytest.approx((s / s.sum()).tolist(), rel=2.0**-18)


@every_router
@pytest.mark.parametrize("text", ["softmax", "sigmoid:groups=4/2:top2", "softmax_topk", "sigmoid:groups=2/0"])
def test_decision_ties_f09_go_to_the_lowest_id_where_claimed(router: Candidate, text: str) -> None:
    logits = [[0.5] * 8, [1, 2, 2, 1, 2, 2, 1, 2], [0, 0, 3, 0, 0, 0, 0, 0]]
    ids = [sorted(row) for row in routed(router, make(text, T=3, logits=logits))[0]]
    if router.claims.ties != "lowest":
        return
    want = {
        "softmax": [[0, 1, 2, 3], [1, 2, 4, 5], [0, 1, 2, 3]],
        "sigmoid:groups=4/2:top2": [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 2, 3]],
        "softmax_topk": [[0, 1, 2, 3], [1, 2, 4, 5], [0, 1, 2, 3]],
        "sigmoid:groups=2/0": [[0, 1, 4, 5], [1, 2, 4, 5], [0, 2, 4, 5]],
    }[text]

    assert ids == want


BAD_ROWS = {
    "one NaN": [1.0, NAN, 3.0, 2.0, 0.5, -1.0, 0.0, 4.0],
    "all NaN": [NAN] * 8,
    "all -inf": [-INF] * 8,
    "one inf": [1.0, 2.0, INF, 0.0, 0.5, 0.25, 3.0, -2.0],
    "two finite": [NAN, -INF, NAN, 1.0, NAN, NAN, 2.0, NAN],
    "inf and NaN": [INF, NAN, INF, -INF, 0.0, 1.0, 2.0, 3.0],
}


@every_router
@pytest.mark.parametrize(
    "text", ["softmax:renorm=sum", "sigmoid:bias:groups=4/2:top2:renorm=sum", "softmax_topk", "sqrtsoftplus"]
)
def test_decision_nan_inf_f08_rows_are_total_and_others_do_not_notice(router: Candidate, text: str) -> None:
    clean = [[0.5, -1.0, 2.0, 3.0, -2.0, 0.25, 1.0, 0.0], [2.0, 1.5, -3.0, 0.5, 4.0, 3.5, 0.75, -0.5]]
    finite = routed(router, make(text, T=2, logits=clean))

    ids, weights = routed(router, make(text, T=2 + len(BAD_ROWS), logits=[clean[0], *BAD_ROWS.values(), clean[1]]))

    assert (ids[0], ids[-1]) == (finite[0][0], finite[0][1])
    assert (weights[0], weights[-1]) == (finite[1][0], finite[1][1])
    for row in ids:
        assert len(set(row)) == 4
        assert all(0 <= i < 8 for i in row)
    if not router.claims.total_router:
        return
    by_name = dict(zip(BAD_ROWS, zip(ids[1:-1], weights[1:-1], strict=True), strict=False))
    for name in ("all NaN", "all -inf"):
        assert sorted(by_name[name][0]) == [0, 1, 2, 3]
        assert by_name[name][1] == [0.0] * 4
    for name, (row_ids, row_weights) in by_name.items():
        assert all(math.isfinite(w) for w in row_weights), name
        for i, w in zip(row_ids, row_weights, strict=True):
            assert w == 0 or BAD_ROWS[name][i] > -INF, f"{name}: expert {i} has weight {w}"
    assert {3, 6} <= set(by_name["two finite"][0]) or "groups" in text
    assert 2 in by_name["one inf"][0]


@every_router
def test_decision_nan_inf_sparsemixer_names_two_experts(router: Candidate) -> None:
    ids, weights = routed(router, make("sparsemixer", K=2, T=len(BAD_ROWS), logits=list(BAD_ROWS.values())))

    for row_ids, row_weights in zip(ids, weights, strict=True):
        assert len(set(row_ids)) == 2
        assert all(math.isfinite(w) for w in row_weights)


@every_router
@pytest.mark.parametrize(
    "text", ["sigmoid:renorm=sum", "sigmoid:renorm=floor/1e-12", "sqrtsoftplus:renorm=sum", "softmax:renorm=sum"]
)
def test_decision_renormalisation_f08_finite_logits_give_finite_weights(router: Candidate, text: str) -> None:
    logits = [[-100.0 - i for i in range(8)], [-1e4] * 8, [-LARGEST, LARGEST, 0, 1, 2, 3, 4, 5], [LARGEST] * 8]

    _, weights = routed(router, make(text, T=4, logits=logits))

    assert all(math.isfinite(w) and w >= 0 for row in weights for w in row)


@every_router
def test_decision_empty_no_tokens(router: Candidate) -> None:
    assert routed(router, make("sigmoid:groups=4/2:renorm=sum", T=0)) == ([], [])


@every_router
def test_decision_strided_logits_are_not_misread(router: Candidate) -> None:
    inputs = make("softmax:bias")
    assert inputs.logits is not None
    assert inputs.correction_bias is not None
    wide = torch.full((6, 17), NAN, device=DEVICE)
    wide[:, 1::2] = inputs.logits
    strided = inputs.map({"logits": wide[:, 1::2]})

    assert routed(router, strided) == routed(router, inputs)


@pytest.mark.parametrize(
    ("text", "E", "K", "named"),
    [
        ("sigmoid:groups=3/2", 8, 4, "do not divide into groups=3"),
        ("sigmoid:groups=4/1", 8, 4, "only 2 experts in the 1 kept groups"),
        ("sigmoid:groups=8/4:top2", 8, 4, "top2 needs 2 experts per group"),
        ("sigmoid:groups=4/0", 8, 2, "quota from every group"),
        ("softmax", 3, 4, "only 3 experts"),
        ("sparsemixer", 8, 4, "sparsemixer selects 2"),
    ],
)
def test_decision_wrong_shapes_f08_f12_impossible_groupings_are_refused_not_replaced(
    text: str, E: int, K: int, named: str
) -> None:
    """Never a silent fall-back to plain top-k, and never -0 or NaN for experts that do not exist."""
    with pytest.raises(ContractError, match=named):
        Problem(T=1, H=4, I=4, E=E, K=K, router=Router.parse(text))
