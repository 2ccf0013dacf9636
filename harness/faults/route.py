"""ROUTE of the plain pipeline, in float32: one method per step, so that a fault replaces one step.

Written from docs/contract.md alone; shares nothing with the oracle or with reference/eager.
"""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor
NEG = -torch.inf
LARGEST = torch.finfo(torch.float32).max
GUARD = 1e-20
"""Least divisor of a plain renormalisation."""


def softmax(x: Tensor) -> Tensor:
    """Along the last dim; a row of -inf gives zeros."""
    best = x.amax(dim=-1, keepdim=True)
    e = torch.exp(x - torch.where(best == NEG, 0.0, best))
    return e / e.sum(dim=-1, keepdim=True).clamp(min=1e-37)


class RouteSteps:
    """logits (T, E') -> ids int32 (T, K'), weights float32 (T, K')."""

    def route(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        p, r = inputs.problem, inputs.problem.router
        x = self.read_logits(inputs)
        if r.score == "sparsemixer":
            return self.sparsemixer(x, r.jitter_eps, r.scale)
        s = self.scores(x, r)
        choice = self.choice(s, x, inputs)
        ids = self.select(choice, r, p.K)
        if r.table:
            assert inputs.table_ids is not None
            ids = inputs.table_ids.long()
        w = self.gather(s, choice, x, ids, r)
        w = self.renormalise(w, r)
        w = self.scale(w, ids, inputs)
        ids, w = self.bad_rows(ids, w, inputs)
        if r.fused_shared:
            more = torch.arange(p.E, p.weight_experts).expand(ids.shape[0], -1)
            ids, w = torch.cat([ids, more], 1), torch.cat([w, torch.ones_like(more, dtype=w.dtype)], 1)
        return ids.int(), w

    def read_logits(self, inputs: Inputs) -> Tensor:
        """NaN counts as -inf; then multiplier and soft cap."""
        assert inputs.logits is not None
        r = inputs.problem.router
        x = torch.where(inputs.logits.isnan(), NEG, inputs.logits).clamp(max=LARGEST) * r.multiplier
        return r.softcap * torch.tanh(x / r.softcap) if r.softcap else x

    def scores(self, x: Tensor, r: Router) -> Tensor:
        if r.score == "softmax":
            return softmax(x)
        if r.score == "sigmoid":
            return torch.sigmoid(x)
        if r.score == "sqrtsoftplus":
            return torch.nn.functional.softplus(x).sqrt()
        return x  # softmax_topk selects by the logit

    def choice(self, s: Tensor, x: Tensor, inputs: Inputs) -> Tensor:
        """What selection compares: biased scores, -inf where there is no logit."""
        if inputs.problem.router.bias:
            assert inputs.correction_bias is not None
            s = s + inputs.correction_bias
        return torch.where(x == NEG, NEG, s)

    def select(self, choice: Tensor, r: Router, k: int) -> Tensor:
        if not r.groups:
            return self.top(choice, k)
        grouped = choice.unflatten(1, (r.groups, -1))
        if not r.keep:
            quota = k // r.groups
            best = torch.stack([self.top(g, quota) for g in grouped.unbind(1)], 1)
            return (best + torch.arange(r.groups)[None, :, None] * grouped.shape[2]).flatten(1)
        kept = self.top(self.group_scores(grouped, r), r.keep)
        keep = torch.zeros(choice.shape[0], r.groups, dtype=torch.bool).scatter_(1, kept, True)
        return self.top(self.reject(choice, keep.repeat_interleave(grouped.shape[2], 1), r), k)

    def group_scores(self, grouped: Tensor, r: Router) -> Tensor:
        """(T, groups, per group) -> (T, groups)."""
        return grouped.sort(dim=-1, descending=True).values[..., : 2 if r.group_score == "top2" else 1].sum(-1)

    def reject(self, choice: Tensor, keep: Tensor, r: Router) -> Tensor:
        """Experts of rejected groups out of the race; what has no logit stays out either way."""
        return torch.where(keep | (choice == NEG), choice, NEG if r.rejected == "neginf" else 0.0)

    def top(self, choice: Tensor, k: int) -> Tensor:
        """int64 (T, k): best first, ties to the lowest id."""
        return choice.sort(dim=-1, descending=True, stable=True).indices[:, :k]

    def gather(self, s: Tensor, choice: Tensor, x: Tensor, ids: Tensor, r: Router) -> Tensor:
        """Unbiased scores of the selected."""
        picked = x.gather(1, ids)
        w = softmax(picked) if r.score == "softmax_topk" else s.gather(1, ids)
        return torch.where(picked == NEG, 0.0, w)

    def renormalise(self, w: Tensor, r: Router) -> Tensor:
        total = w.sum(-1, keepdim=True)
        if r.renorm == "none":
            return w
        if r.renorm == "eps":
            return w / (total + r.renorm_value)
        if r.renorm == "lp":
            total = (w.abs() ** r.renorm_value).sum(-1, keepdim=True) ** (1 / r.renorm_value)
        return w / self.guard_divisor(total, r.renorm_value if r.renorm == "floor" else GUARD)

    def guard_divisor(self, total: Tensor, least: float) -> Tensor:
        return total.clamp(min=least)

    def scale(self, w: Tensor, ids: Tensor, inputs: Inputs) -> Tensor:
        """Routed scaling factor, then each expert's own."""
        p = inputs.problem
        w = w * p.router.scale
        if inputs.expert_scale is not None:
            w = w * torch.where(ids < p.E, inputs.expert_scale[ids.clamp(max=p.E - 1)], 1.0)
        return w

    def bad_rows(self, ids: Tensor, w: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Last word on rows with NaN or infinite logits: nothing to mend here, NaN was taken out at the start."""
        return ids, w

    def sparsemixer(self, x: Tensor, eps: float, scale: float) -> tuple[Tensor, Tensor]:
        """Two rounds of: take the best, drop what lies far below it, softmax the rest."""
        ids, rest, parts = self.top(x, 2), x, []
        for k in range(2):
            chosen = ids[:, k : k + 1]
            best = rest.gather(1, chosen)
            far = (best - x) / torch.maximum(x.abs(), best) > 2 * eps
            parts.append(softmax(torch.where(far | (rest == NEG), NEG, rest)).gather(1, chosen))
            rest = rest.scatter(1, chosen, NEG)
        w = torch.where(x.gather(1, ids) == NEG, 0.0, torch.cat(parts, 1))
        return ids.int(), w * scale
