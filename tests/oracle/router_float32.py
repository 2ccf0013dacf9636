"""ROUTE in plain float32 torch, as a model would write it. Right by construction of float32: the oracle must accept it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor


def scores(x: Tensor, score: str) -> Tensor:
    if score == "softmax":
        return torch.softmax(x, dim=-1)
    if score == "sigmoid":
        return torch.sigmoid(x)
    return F.softplus(x).sqrt() if score == "sqrtsoftplus" else x


def sorted_top(x: Tensor, k: int) -> Tensor:
    return x.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def masked_groups(choice: Tensor, router: Router) -> Tensor:
    grouped = choice.unflatten(1, (router.groups, -1))
    best = grouped.topk(2, dim=-1).values.sum(-1) if router.group_score == "top2" else grouped.amax(-1)
    keep = torch.zeros_like(best, dtype=torch.bool).scatter(1, sorted_top(best, router.keep), True)
    fill = 0.0 if router.rejected == "zero" else -torch.inf
    return grouped.masked_fill(~keep[..., None], fill).flatten(1)


def quota(choice: Tensor, router: Router, k: int) -> Tensor:
    grouped = choice.unflatten(1, (router.groups, -1))
    size, each = grouped.shape[2], k // router.groups
    return torch.cat([sorted_top(grouped[:, g], each) + g * size for g in range(router.groups)], dim=1)


def sparsemixer(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """After Phi-3.5-MoE's modeling file, in inference."""
    best, first = x.max(dim=-1, keepdim=True)
    far = (best - x) / x.abs().clamp(min=best) > 2 * eps
    w1 = torch.softmax(x.masked_fill(far, -torch.inf), dim=-1).gather(1, first)
    left = x.scatter(1, first, -torch.inf)
    best, second = left.max(dim=-1, keepdim=True)
    far = (best - x) / x.abs().clamp(min=best) > 2 * eps
    w2 = torch.softmax(left.masked_fill(far, -torch.inf), dim=-1).gather(1, second)
    return torch.cat([first, second], dim=1), torch.cat([w1, w2], dim=1)


def renormalised(w: Tensor, router: Router) -> Tensor:
    if router.renorm == "none":
        return w
    if router.renorm == "eps":
        return w / (w.sum(-1, keepdim=True) + router.renorm_value)
    if router.renorm == "floor":
        return w / w.sum(-1, keepdim=True).clamp(min=router.renorm_value)
    norm = w.norm(p=router.renorm_value, dim=-1, keepdim=True) if router.renorm == "lp" else w.sum(-1, keepdim=True)
    return w / norm.clamp(min=1e-20)


def route32(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, weights, scores that selection compared, before groups), for finite logits."""
    p, router = inputs.problem, inputs.problem.router
    x = inputs.logits * router.multiplier
    if router.softcap:
        x = router.softcap * torch.tanh(x / router.softcap)
    if router.score == "sparsemixer":
        ids, w = sparsemixer(x, router.jitter_eps)
        choice = x
    else:
        s = scores(x, router.score)
        choice = s + inputs.correction_bias if router.bias else s
        if router.table:
            ids = inputs.table_ids.long()
        elif router.groups and not router.keep:
            ids = quota(choice, router, p.K)
        else:
            ids = sorted_top(masked_groups(choice, router) if router.groups else choice, p.K)
        w = torch.softmax(x.gather(1, ids), dim=-1) if router.score == "softmax_topk" else s.gather(1, ids)
    w = renormalised(w, router) * router.scale
    if router.expert_scale:
        factor = torch.cat([inputs.expert_scale, torch.ones(router.zero_experts)])
        w = w * factor[ids]
    T = x.shape[0]
    ids = torch.cat([ids, torch.arange(p.E, p.weight_experts).expand(T, -1)], dim=1)
    w = torch.cat([w, torch.ones(T, router.fused_shared)], dim=1)
    return ids, w, masked_choice(choice, router)


def masked_choice(choice: Tensor, router: Router) -> Tensor:
    """What the oracle calls `choice`: with rejected groups filled in."""
    return masked_groups(choice, router) if router.groups and router.keep else choice
