"""ROUTE in plain float32 PyTorch: logits to ids and weights, for the whole router vocabulary.

Total: every row gets distinct ids in range and finite weights, whatever the logits hold. NaN counts as -inf, +inf as the
largest float32. An expert with logit -inf is never preferred and has weight exactly 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor
LARGEST = torch.finfo(torch.float32).max
GUARD = 1e-20
"""Least divisor of a renormalisation that names no epsilon or floor of its own."""


def best(scores_TE: Tensor, count: int) -> Tensor:
    """int64 (T, count): columns of the largest scores, best first; of equal scores the lowest column first."""
    return torch.sort(scores_TE, dim=1, descending=True, stable=True).indices[:, :count]


def sanitised(logits_TE: Tensor, router: Router) -> Tensor:
    """float32 logits after NaN and infinities, multiplier and soft cap."""
    x = torch.where(logits_TE.isnan(), -torch.inf, logits_TE.float())
    x = torch.clamp(x, max=LARGEST)
    if router.multiplier != 1.0:
        x = torch.clamp(x * router.multiplier, max=LARGEST)
    if router.softcap:
        x = router.softcap * torch.tanh(x / router.softcap)
    return x


def softmax(x: Tensor) -> Tensor:
    """Row softmax of (T, n); all zeros where the whole row is -inf."""
    top = x.max(dim=1, keepdim=True).values
    e = torch.exp(x - torch.where(top == -torch.inf, 0.0, top))
    total = e.sum(dim=1, keepdim=True)
    return torch.where(total > 0, e / total, 0.0)


def _sqrtsoftplus(x: Tensor) -> Tensor:
    return torch.sqrt(torch.relu(x) + torch.log1p(torch.exp(-x.abs())))


_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": softmax,
    "softmax_topk": lambda x: x,  # selection looks at the logits; the weights come after
    "sigmoid": lambda x: 1.0 / (1.0 + torch.exp(-x)),
    "sqrtsoftplus": _sqrtsoftplus,
}


def choose(choice_TE: Tensor, router: Router, K: int) -> Tensor:
    """int64 (T, K): the best K, or the best K of the kept groups, or a fixed quota from every group."""
    if not router.groups:
        return best(choice_TE, K)
    T, E = choice_TE.shape
    size = E // router.groups
    members = [choice_TE[:, g * size : (g + 1) * size] for g in range(router.groups)]
    if not router.keep:
        return torch.cat([best(m, K // router.groups) + g * size for g, m in enumerate(members)], dim=1)
    counted = 2 if router.group_score == "top2" else 1
    of_group = torch.stack([torch.sort(m, dim=1, descending=True).values[:, :counted].sum(dim=1) for m in members], dim=1)
    kept_TG = torch.zeros(T, router.groups, dtype=torch.bool, device=choice_TE.device)
    kept_TG[torch.arange(T, device=choice_TE.device)[:, None], best(of_group, router.keep)] = True
    rejected = 0.0 if router.rejected == "zero" else -torch.inf
    masked = [torch.where(kept_TG[:, g, None], m, rejected) for g, m in enumerate(members)]
    return best(torch.cat(masked, dim=1), K)


def sparsemixer(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ids int64 (T, 2) and weights (T, 2). Two rounds: take the best of what is left, drop every expert whose relative
    gap (best - x) / max(|x|, best) exceeds 2 eps, and weigh the winner by a softmax over the rest."""
    ids = best(x, 2)  # in one go: in a row without a finite logit the second winner must still be another expert
    left = x.clone()
    weights = []
    for winner in ids.split(1, dim=1):
        top = left.gather(1, winner)
        far = (top - x) / torch.maximum(x.abs(), top) > 2 * eps
        weights.append(softmax(left.masked_fill(far, -torch.inf)).gather(1, winner))
        left.scatter_(1, winner, -torch.inf)
    return ids, torch.cat(weights, dim=1)


def renormalised(w_TK: Tensor, router: Router) -> Tensor:
    if router.renorm == "none":
        return w_TK
    if router.renorm == "lp":
        # Scaled by the largest, so that small weights do not vanish in the power.
        big = w_TK.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        p = router.renorm_value
        return w_TK / (big * ((w_TK.abs() / big) ** p).sum(dim=1, keepdim=True) ** (1 / p)).clamp(min=GUARD)
    total = w_TK.sum(dim=1, keepdim=True)
    if router.renorm == "eps":
        return w_TK / (total + router.renorm_value)
    return w_TK / total.clamp(min=router.renorm_value if router.renorm == "floor" else GUARD)


def _need(tensor: Tensor | None, name: str, router: Router) -> Tensor:
    if tensor is None:
        raise ContractError(f"router '{router}' needs {name}, which is None")
    return tensor


def route(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """topk_ids int32 and topk_weights float32, both (T, K + fused shared slots), of inputs.logits (T, E + Z)."""
    p, router = inputs.problem, inputs.problem.router
    x = sanitised(_need(inputs.logits, "logits", router), router)
    if router.score == "sparsemixer":
        ids, w = sparsemixer(x, router.jitter_eps)
    else:
        scores = _SCORES[router.score](x)
        if router.table:
            ids = _need(inputs.table_ids, "table_ids", router).long()
        else:
            choice = scores + _need(inputs.correction_bias, "correction_bias", router) if router.bias else scores
            ids = choose(choice.masked_fill(x == -torch.inf, -torch.inf), router, p.K)
        w = softmax(x.gather(1, ids)) if router.score == "softmax_topk" else scores.gather(1, ids)
    w = renormalised(w.masked_fill(x.gather(1, ids) == -torch.inf, 0.0), router) * router.scale
    if router.expert_scale:
        # Identity experts own no weights, and no learned factor either.
        factor = _need(inputs.expert_scale, "expert_scale", router)[ids.clamp(max=p.E - 1)]
        w = w * torch.where(ids < p.E, factor, 1.0)
    T, shared = ids.size(0), router.fused_shared
    ids = torch.cat([ids, torch.arange(p.E, p.E + shared, device=ids.device).expand(T, shared)], dim=1)
    w = torch.cat([w, torch.ones(T, shared, device=w.device)], dim=1)
    return ids.to(torch.int32), w
