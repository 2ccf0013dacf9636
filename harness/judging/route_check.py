"""ROUTE: ids as a set with a tie margin, weights by the id they belong to."""

from __future__ import annotations

import torch

from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import FORMATS
from moeproof.reference.contract.stages import Stage
from moeproof.reference.oracle.router import Selection, route, weigh
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor


def check_ids(got: Tensor, want: Selection, inputs: Inputs, claims: Claims) -> tuple[list[Finding], Tensor]:
    """(findings, rows (T,) whose weights can be compared)."""
    p = inputs.problem
    ids = got.long()
    limit = p.routed_ids + p.router.fused_shared
    findings = []
    outside = (ids < 0) | (ids >= limit)
    if bool(outside.any()):
        findings.append(_id_finding(outside, ids, f"id out of range [0, {limit})"))
    sorted_ids = ids.sort(dim=1).values
    repeated = torch.zeros_like(outside)
    if not p.router.table:
        repeated[:, 1:] = sorted_ids[:, 1:] == sorted_ids[:, :-1]
    if bool(repeated.any()):
        findings.append(_id_finding(repeated, sorted_ids, "an expert is named twice"))
    usable = ~(outside | repeated).any(dim=1)
    wrong = ~_acceptable(ids, want, inputs, claims) & usable[:, None]
    if bool(wrong.any()):
        findings.append(_id_finding(wrong, ids, "not among the best experts, outside the tie margin"))
    return findings, usable & ~wrong.any(dim=1)


def _acceptable(ids: Tensor, want: Selection, inputs: Inputs, claims: Claims) -> Tensor:
    """bool (T, K'): slots whose expert may stand in the row; a row that lacks a clear winner is wrong in its first slot."""
    p = inputs.problem
    K = p.K
    if p.router.table:
        return ids == want.ids
    safe = ids.clamp(0, p.routed_ids - 1)
    routed = safe[:, :K]
    score, margin = want.choice, want.margin
    # A chosen expert must reach the K-th best score, an unchosen one must not beat it, both within the margins.
    kth = score.gather(1, want.ids[:, :K]).amin(dim=1, keepdim=True)
    slack = margin + margin.gather(1, want.ids[:, :K]).amax(dim=1, keepdim=True)
    slack = torch.where(score.isneginf(), 0.0, slack)
    low = score < kth - slack
    clear = score > kth + slack
    ok = ~low.gather(1, routed)
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(1, routed, True)
    if claims.ties == "lowest":
        ok &= ~_skips_equal(chosen, inputs).gather(1, routed)
    missing = (clear & ~chosen).any(dim=1)
    ok[:, 0] &= ~missing
    if not p.router.keep and p.router.groups:
        # A quota from every group: the K-th best over all groups means nothing.
        ok = torch.ones_like(ok)
        ok[:, 0] = (routed.sort(1).values == want.ids[:, :K].sort(1).values).all(1) | _near_quota_tie(want, inputs)
    if p.router.score == "sparsemixer":
        ok = routed == want.ids[:, :K]
    undecided = want.open_groups if p.router.groups else torch.zeros_like(want.open_groups)
    ok = ok | undecided[:, None]
    if p.router.fused_shared:
        ok = torch.cat([ok, ids[:, K:] == want.ids[:, K:]], dim=1)
    return ok


def _skips_equal(chosen: Tensor, inputs: Inputs) -> Tensor:
    """bool (T, E'): chosen although a lower id with the same logit and bias, bit for bit, was not."""
    assert inputs.logits is not None
    p, logits = inputs.problem, inputs.logits
    out = torch.zeros_like(chosen)
    group = torch.arange(chosen.shape[1], device=chosen.device) // (p.routed_ids // max(p.router.groups, 1))
    for lower in range(chosen.shape[1]):
        same = (logits == logits[:, lower : lower + 1]) & (group == group[lower])
        if inputs.correction_bias is not None:
            same &= inputs.correction_bias == inputs.correction_bias[lower]
        later = torch.arange(chosen.shape[1], device=chosen.device) > lower
        out |= same & later & chosen & ~chosen[:, lower : lower + 1]
    return out


def _near_quota_tie(want: Selection, inputs: Inputs) -> Tensor:
    p = inputs.problem
    grouped = want.choice.view(want.choice.shape[0], p.router.groups, -1)
    quota = p.K // p.router.groups
    if quota >= grouped.shape[2]:
        return torch.zeros(grouped.shape[0], dtype=torch.bool, device=grouped.device)
    ordered = grouped.sort(dim=-1, descending=True).values
    margin = 2 * want.margin.view_as(grouped).amax(dim=-1)
    return ((ordered[:, :, quota - 1] - ordered[:, :, quota]) <= margin).any(dim=1)


def _id_finding(bad: Tensor, ids: Tensor, message: str) -> Finding:
    token, slot = (int(i) for i in bad.nonzero()[0])
    return Finding(
        Stage.ROUTE,
        "topk_ids",
        message,
        token=token,
        slot=slot,
        expert=int(ids[token, slot]),
        bad=int(bad.sum()),
        total=bad.numel(),
    )


def check_route(ids: Tensor, weights: Tensor, inputs: Inputs, claims: Claims) -> Comparison:
    """Judge a router's ids (T, K') and weights (T, K') for inputs.logits."""
    want = route(inputs)
    findings, rows = check_ids(ids, want, inputs, claims)
    if not claims.total_router:
        rows = rows & want.defined
    result = compare("topk_weights", weights, _weights_of(ids, rows, want, inputs))
    return Comparison((*findings, *result.findings), ids.numel() + result.checked, result.ratio)


def _weights_of(ids: Tensor, rows: Tensor, want: Selection, inputs: Inputs) -> Value:
    """The oracle's weights of the experts that the candidate chose: where a tie went the other way, other experts' weights."""
    p = inputs.problem
    if p.router.score == "sparsemixer":
        value = weights_at(ids, want, inputs)
        return Value(value.value, value.bound, rows & (ids.long().sort(1).values == want.ids.sort(1).values).all(1), value.fmt)
    return stored(*weigh(inputs, ids[:, : p.K].long().clamp(0, p.routed_ids - 1)), FORMATS["fp32"], rows)


def weights_at(ids: Tensor, want: Selection, inputs: Inputs) -> Value:
    """The oracle's weights in the candidate's slot order."""
    size = inputs.problem.routed_ids + inputs.problem.router.fused_shared
    if inputs.problem.router.table:
        return stored(want.weights, want.error, FORMATS["fp32"])
    by_id = torch.full((ids.shape[0], size), torch.nan, dtype=torch.float64, device=ids.device)
    noise = torch.zeros_like(by_id)
    by_id.scatter_(1, want.ids, want.weights)
    noise.scatter_(1, want.ids, want.error)
    safe = ids.long().clamp(0, size - 1)
    return stored(by_id.gather(1, safe), noise.gather(1, safe), FORMATS["fp32"])
