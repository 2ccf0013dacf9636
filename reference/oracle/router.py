"""ROUTE in float64: logits to ids and weights, with the margins inside which a tie may go either way."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.router import Router
from moeproof.reference.oracle.bounds import U32

Tensor = torch.Tensor
FLOAT32_MAX = 3.4028234663852886e38
FLOOR = 1e-20
"""The contract's guard of a plain sum (docs/contract.md): finite logits always give finite weights."""
TINY = 2.0**-120


@dataclass(frozen=True)
class Selection:
    """What ROUTE must produce, and what it may.

    `ids` int64 (T, K') with K' = K + fused shared slots, ties to the lowest id; `weights` float64 (T, K') and their allowed
    error. `choice` (T, E') is the score that selection compares (-inf where not selectable) and `margin` (T, E') how far
    float32 arithmetic may move it. `open_groups` (T,) marks rows whose group selection is itself within its margin.
    `defined` (T,) marks rows whose logits are all finite.
    """

    ids: Tensor
    weights: Tensor
    error: Tensor
    choice: Tensor
    margin: Tensor
    open_groups: Tensor
    defined: Tensor


def top(scores: Tensor, k: int) -> Tensor:
    """int64 (T, k): indices of the k largest, best first, ties to the lowest index (torch.topk promises no order)."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :k]


def prepare_logits(logits: Tensor, router: Router) -> Tensor:
    """float64 logits after multiplier and soft cap. NaN counts as -inf, +inf as float32's largest value."""
    x = logits.double().nan_to_num(nan=-torch.inf, posinf=FLOAT32_MAX, neginf=-torch.inf) * router.multiplier
    return router.softcap * torch.tanh(x / router.softcap) if router.softcap else x


def _softmax(x: Tensor) -> Tensor:
    best = x.max(dim=-1, keepdim=True).values
    e = torch.exp(x - torch.where(best.isfinite(), best, 0.0))
    return e / e.sum(dim=-1, keepdim=True).clamp(min=TINY)


def score(x: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """(scores, allowed error), float64 (T, E). `softmax_topk` and sparsemixer select by the logit itself.

    exp's argument carries a relative u, which becomes |x| u in the result; a softmax adds E terms of random rounding.
    """
    size = x.abs().nan_to_num(posinf=0.0)
    noise = 4 * U32 * size * (router.multiplier != 1.0 or router.softcap > 0)
    if router.score == "softmax":
        best = x.max(dim=-1, keepdim=True).values.nan_to_num(neginf=0.0)
        s = _softmax(x)
        relative = (8 + x.shape[-1] ** 0.5 + (x - best).abs().nan_to_num(posinf=0.0)) * U32 + 2 * noise.amax(-1, keepdim=True)
        return s, relative * s + TINY
    if router.score == "sigmoid":
        s = torch.sigmoid(x)
        return s, ((8 + size) * U32 + noise) * s + TINY
    if router.score == "sqrtsoftplus":
        soft = torch.nn.functional.softplus(x, threshold=700.0)
        s = soft.sqrt()
        # log(1 + exp(x)) without log1p has an absolute error of u, which the root divides by 2 s.
        relative = (8 + size) * U32 + noise
        return s, relative * s + torch.minimum(s, 2 * U32 / (2 * s).clamp(min=TINY)) + TINY
    return x, noise + 2 * U32 * size * (router.multiplier != 1.0)


def select(choice: Tensor, margin: Tensor, router: Router, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, choice with rejected groups masked, rows whose group choice is within its margin)."""
    T, E = choice.shape
    if not router.groups:
        return top(choice, k), choice, torch.zeros(T, dtype=torch.bool, device=choice.device)
    grouped = choice.view(T, router.groups, E // router.groups)
    if not router.keep:
        quota = k // router.groups
        first = torch.arange(router.groups, device=choice.device)[None, :, None] * grouped.shape[2]
        ids = torch.argsort(grouped, dim=-1, descending=True, stable=True)[:, :, :quota] + first
        return ids.reshape(T, k), choice, torch.zeros(T, dtype=torch.bool, device=choice.device)
    best = 1 if router.group_score == "max" else 2
    group_score = grouped.sort(dim=-1, descending=True).values[:, :, :best].sum(dim=-1)
    kept = top(group_score, router.keep)
    keep = torch.zeros(T, router.groups, dtype=torch.bool, device=choice.device).scatter_(1, kept, True)
    slack = best * margin.view(T, router.groups, E // router.groups).amax(dim=-1)
    worst_kept = torch.where(keep, group_score - slack, torch.inf).amin(dim=-1)
    best_lost = torch.where(keep, -torch.inf, group_score + slack).amax(dim=-1)
    mask = keep.repeat_interleave(E // router.groups, dim=1)
    # What has no finite logit stays -inf: a 0 would prefer it to negative scores, and to lower ids in a row without any.
    rejected = torch.where(mask | choice.isneginf(), choice, -torch.inf if router.rejected == "neginf" else 0.0)
    return top(rejected, k), rejected, best_lost >= worst_kept


def renormalise(w: Tensor, error: Tensor, router: Router) -> tuple[Tensor, Tensor]:
    """Weights divided by their norm, by the router's rule, and the error carried through."""
    if router.renorm == "none":
        return w, error
    if router.renorm == "lp":
        norm = (w.abs() ** router.renorm_value).sum(dim=-1, keepdim=True) ** (1 / router.renorm_value)
    else:
        norm = w.sum(dim=-1, keepdim=True)
    if router.renorm == "eps":
        norm = norm + router.renorm_value
    else:
        norm = norm.clamp(min=router.renorm_value if router.renorm == "floor" else FLOOR)
    relative = error.sum(dim=-1, keepdim=True) / norm + (4 + w.shape[-1]) * U32
    return w / norm, error / norm + relative * w.abs() / norm


def _sparsemixer(x: Tensor, ids: Tensor, noise: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """weights (T, 2) of two winners and error: two rounds of "take the best, mask what is far below it, softmax the rest".

    The winners come as two ids: a row with fewer than two finite logits still names two experts.
    """
    weights = []
    rest = x
    for index in ids.split(1, dim=1):
        best = rest.gather(1, index)
        gap = (best - x) / torch.maximum(x.abs(), best)
        masked = torch.where((gap > 2 * eps) | rest.isneginf(), -torch.inf, rest)
        weights.append(_softmax(masked).gather(1, index))
        rest = rest.scatter(1, index, -torch.inf)
    w = torch.cat(weights, dim=1)
    relative = (16 + x.abs().nan_to_num(posinf=0.0).amax(dim=-1, keepdim=True)) * U32 + 2 * noise.amax(-1, keepdim=True)
    return w, relative * w + TINY


def route(inputs: Inputs) -> Selection:
    """ROUTE for inputs.logits. See Selection for what comes back and Router for the order of operations."""
    p, router = inputs.problem, inputs.problem.router
    assert inputs.logits is not None
    x = prepare_logits(inputs.logits, router)
    defined = inputs.logits.isfinite().all(dim=-1)
    scores, noise = score(x, router)
    choice, margin = scores, noise
    if router.bias:
        assert inputs.correction_bias is not None
        bias = inputs.correction_bias.double()
        choice = torch.where(x.isneginf(), -torch.inf, scores + bias)
        margin = noise + U32 * (scores.abs() + bias.abs())
    else:
        choice = torch.where(x.isneginf(), -torch.inf, choice)
    if router.score == "sparsemixer":
        ids, open_groups = top(x, 2), _near_threshold(x, router.jitter_eps)
    else:
        ids, choice, open_groups = select(choice, margin, router, p.K)
        if router.table:
            assert inputs.table_ids is not None
            ids = inputs.table_ids.long()
    weights, error = weigh(inputs, ids)
    if router.fused_shared:
        extra = torch.arange(p.E, p.weight_experts, device=ids.device).expand(ids.shape[0], -1)
        ids = torch.cat([ids, extra], dim=1)
    return Selection(ids, weights, error, choice, margin, open_groups, defined)


def weigh(inputs: Inputs, ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """(weights, allowed error), float64 (T, K'), of the experts `ids_TK`, whoever chose them; shared ones are appended.

    Identity experts count; every id must be in range. A sparsemixer's weights depend on which of its two came first.
    """
    p, router = inputs.problem, inputs.problem.router
    assert inputs.logits is not None
    x = prepare_logits(inputs.logits, router)
    scores, noise = score(x, router)
    weights, error = scores.gather(1, ids_TK), noise.gather(1, ids_TK)
    if router.score == "sparsemixer":
        weights, error = _sparsemixer(x, ids_TK, noise, router.jitter_eps)
    elif router.score == "softmax_topk":
        picked = x.gather(1, ids_TK)
        weights = _softmax(picked)
        spread = (picked - picked.amax(dim=-1, keepdim=True)).abs().nan_to_num(posinf=0.0)
        error = (8 + p.K + spread) * U32 * weights + 2 * noise.amax(dim=-1, keepdim=True) * weights + TINY
    weights = torch.where(x.gather(1, ids_TK).isneginf(), 0.0, weights)
    weights, error = renormalise(weights, error, router)
    weights, error = weights * router.scale, error * abs(router.scale) + 2 * U32 * (weights * router.scale).abs()
    if router.expert_scale:
        assert inputs.expert_scale is not None
        # Identity experts have no learned factor.
        factor = torch.where(ids_TK < p.E, inputs.expert_scale.double()[ids_TK.clamp(max=p.E - 1)], 1.0)
        weights, error = weights * factor, error * factor.abs() + U32 * (weights * factor).abs()
    if router.fused_shared:
        ones = torch.ones(ids_TK.shape[0], router.fused_shared, dtype=torch.float64, device=ids_TK.device)
        weights, error = torch.cat([weights, ones], dim=1), torch.cat([error, 0 * ones], dim=1)
    return weights, error


def _near_threshold(x: Tensor, eps: float) -> Tensor:
    """Rows in which sparsemixer's mask of some expert is decided by less than float32's rounding."""
    near = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    rest = x
    for _ in range(2):
        best, _ = rest.max(dim=-1, keepdim=True)
        gap = (best - x) / torch.maximum(x.abs(), best)
        near |= ((gap - 2 * eps).abs() < 16 * U32 * (1 + gap.abs())).any(dim=-1)
        rest = rest.scatter(1, top(rest, 1), -torch.inf)
    return near
