"""ROUTE read row by row with Python floats and sorted(): the contract's sentences in order, nothing vectorised.

Agrees with reference.oracle.router in meaning, shares no code with it.
"""

from __future__ import annotations

import math

from moeproof.reference.contract.router import Router

from .scalar import Row, sigmoid

LARGEST = 3.4028234663852886e38
NONE = -math.inf


def prepared(logit: float, router: Router) -> float:
    """NaN counts as -inf, +inf as float32's largest; then the multiplier, then the soft cap."""
    x = NONE if math.isnan(logit) else min(logit, LARGEST)
    x *= router.multiplier
    return router.softcap * math.tanh(x / router.softcap) if router.softcap else x


def softmax(row: Row) -> Row:
    """Zeros where nothing is finite."""
    best = max(row, default=NONE)
    if best == NONE:
        return [0.0] * len(row)
    powers = [math.exp(x - best) for x in row]
    return [p / math.fsum(powers) for p in powers]


def softplus(x: float) -> float:
    return x + math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x))


def scores(row: Row, router: Router) -> Row:
    if router.score == "softmax":
        return softmax(row)
    if router.score == "sigmoid":
        return [0.0 if x == NONE else sigmoid(x) for x in row]
    if router.score == "sqrtsoftplus":
        return [0.0 if x == NONE else math.sqrt(softplus(x)) for x in row]
    return row


def best(choice: Row, k: int) -> list[int]:
    """The k largest, best first; of equals the lowest id."""
    return sorted(range(len(choice)), key=lambda e: (-choice[e], e))[:k]


def chosen(choice: Row, router: Router, k: int) -> list[int]:
    if not router.groups:
        return best(choice, k)
    size = len(choice) // router.groups
    members = [range(g * size, (g + 1) * size) for g in range(router.groups)]
    if not router.keep:
        return [g * size + e for g, m in enumerate(members) for e in best([choice[e] for e in m], k // router.groups)]
    counted = 2 if router.group_score == "top2" else 1
    group_scores = [sum(sorted((choice[e] for e in m), reverse=True)[:counted]) for m in members]
    kept = best(group_scores, router.keep)
    rejected = 0.0 if router.rejected == "zero" else NONE
    # An expert whose logit is -inf is never preferred, not even to be "rejected with 0".
    masked = [c if e // size in kept or c == NONE else rejected for e, c in enumerate(choice)]
    return best(masked, k)


def sparsemixer(row: Row, eps: float) -> tuple[list[int], Row]:
    """Two rounds: the best of what is left; mask what lies more than 2 eps below it, relative to max(|x|, best)."""
    ids, weights, left = best(row, 2), [], list(row)
    for winner in ids:
        top = left[winner]
        masked = []
        for x, rest in zip(row, left, strict=True):
            scale = max(abs(x), top)
            far = scale != 0 and not math.isinf(scale) and (top - x) / scale > 2 * eps
            masked.append(NONE if far or rest == NONE else rest)
        weights.append(softmax(masked)[winner])
        left[winner] = NONE
    return ids, weights


def renormalised(w: Row, router: Router) -> Row:
    total = math.fsum(w)
    match router.renorm:
        case "none":
            return w
        case "sum":
            divisor = max(total, 1e-20)
        case "eps":
            divisor = total + router.renorm_value
        case "floor":
            divisor = max(total, router.renorm_value)
        case "lp":
            divisor = max(math.fsum(abs(v) ** router.renorm_value for v in w) ** (1 / router.renorm_value), 1e-20)
    return [v / divisor for v in w]


def route(
    logits: Row,
    router: Router,
    E: int,
    K: int,
    bias: Row | None = None,
    expert_scale: Row | None = None,
    table: list[int] | None = None,
) -> tuple[list[int], Row]:
    """(ids, weights) of one row, fused shared experts last."""
    row = [prepared(x, router) for x in logits]
    if router.score == "sparsemixer":
        ids, w = sparsemixer(row, router.jitter_eps)
    else:
        s = scores(row, router)
        choice = [c + b for c, b in zip(s, bias, strict=True)] if bias is not None else s
        choice = [NONE if x == NONE else c for x, c in zip(row, choice, strict=True)]
        ids = table if table is not None else chosen(choice, router, K)
        w = softmax([row[e] for e in ids]) if router.score == "softmax_topk" else [s[e] for e in ids]
    w = [0.0 if row[e] == NONE else v for e, v in zip(ids, w, strict=True)]
    w = [v * router.scale for v in renormalised(w, router)]
    if expert_scale is not None:
        w = [v * expert_scale[e] if e < E else v for e, v in zip(ids, w, strict=True)]
    return ids + list(range(E, E + router.fused_shared)), w + [1.0] * router.fused_shared
