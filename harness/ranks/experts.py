"""One rank's experts in isolation: ACT, QUANT2 and GEMM2 of the rows that the candidate itself received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moeproof.harness.judging import quant_expect
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.misround import counted
from moeproof.harness.ranks.rows import Matched
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.chain import Spread, quantised_experts, quantised_rows, spreads
from moeproof.reference.oracle.experts import gemm2
from moeproof.reference.oracle.products import decoded
from moeproof.reference.oracle.quantise import Quantised, dequantise
from moeproof.reference.oracle.value import Value, stored
from moeproof.reference.ranks.alone import alone
from moeproof.reference.ranks.dispatch import Pair
from moeproof.reference.ranks.expect import RankExpectation

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
KEPT = ("h", "hq", "hs", "y")
"""What the experts may show, in the coordinates of their rows."""


def judge_experts(rank: int, view: RankExpectation, shown: Shown, matched: Matched, claims: Claims) -> list[Comparison]:
    """h, hq and hs where they are shown, and y, of each received pair. Findings name the token's own rank and this one."""
    pairs = sorted(matched.places)
    own: dict[str, Tensor] = {}
    for name in KEPT:
        if name not in shown:
            continue
        if name == "hs" and tuple(shown[name].shape) == (1, 1, 1):
            own[name] = shown[name]  # one scale for all
            continue
        flat = gathered(shown[name], matched, pairs)
        if flat is None:
            words = f"has shape {tuple(shown[name].shape)}, which has no place for each received pair"
            return [Comparison((Finding(TENSORS[name], name, words, rank=rank),), 1, 0.0)]
        own[name] = flat[:, None]
    if not own:
        return []
    rows = gathered_rows(shown["rows"], matched, pairs)
    here = alone(view.inputs, pairs, rows if view.operand is None else rows.new_zeros(len(pairs), 0))
    operand = None if view.operand is None else _operand(view, shown, matched, pairs, rows)
    judged = _judged(here, operand, own, claims)
    return [_named(result, rank, pairs) for result in judged]


def _judged(here: Inputs, operand: Quantised | None, own: Shown, claims: Claims) -> list[Comparison]:
    """The first of h, its codes and y that is wrong, or all of them."""
    quantised, ids = here.problem.quant.quantised, here.topk_ids
    taps = _chained(here, operand, claims)
    results: list[Comparison] = []
    if "h" in own:
        results.append(compare("h", own["h"], _stored(taps["h"], own["h"]), ids))
        if quantised and not results[-1].findings:
            results += quant_expect.judge_codes(own, here).values()
    if "y" in own and not any(r.findings for r in results):
        fmt = format_of(own["y"].dtype)
        if not quant_expect.knows_hidden(own):
            want = _stored(taps["y"], own["y"])
        elif quantised:
            want = quant_expect.product(here, "y", own, fmt, claims)
        else:
            want = gemm2(here, own["h"], fmt, claims)
        results.append(counted(compare("y", own["y"], want, ids), "y", own["y"], want))
    return results


def _chained(here: Inputs, operand: Quantised | None, claims: Claims) -> Mapping[str, Spread]:
    """h and y with the bound propagated from the rows that came."""
    if not here.problem.quant.quantised:
        return spreads(here, claims)
    rows = quantised_rows(here) if operand is None else decoded(operand)
    if operand is not None:
        rows = replace(rows, values=rows.values[:, None])
    return dict(zip(("gate_up", "h", "y"), quantised_experts(here, claims, rows), strict=True))


def _stored(spread: Spread, like: Tensor) -> Value:
    return stored(spread.value, spread.allowed, format_of(like.dtype))


def _operand(view: RankExpectation, shown: Shown, matched: Matched, pairs: Sequence[Pair], rows: Tensor) -> Quantised:
    """What the candidate's own codes and scales of its pairs stand for."""
    assert view.operand is not None
    q, a1_scale = view.operand.quantiser, view.inputs.a1_scale
    scales = shown["row_scales"]
    if q.by_token:
        scales = gathered_rows(scales, matched, pairs)
    else:
        scales = scales.flatten()[:1].view(1, 1)
    return dequantise(q, view.inputs.problem.fmt, rows, scales, g=a1_scale if q.two_level else None)


def gathered_rows(rows: Tensor, matched: Matched, pairs: Sequence[Pair]) -> Tensor:
    """(n, .) of rows (n, .) or (e, C, .): what each pair reads. By bytes: not every narrow dtype can be indexed."""
    places = [matched.places[p] for p in pairs]
    flat = rows.flatten(0, 1) if rows.dim() == 3 else rows
    index = [a * rows.shape[1] + b for a, b in places] if rows.dim() == 3 else [a for a, _ in places]
    return _picked(flat, index)


def gathered(y: Tensor, matched: Matched, pairs: Sequence[Pair]) -> Tensor | None:
    """(n, .) of y (n, K, .) or (e, C, .): what became of each pair; None where y has no such place."""
    places = [matched.places[p] for p in pairs]
    if y.dim() != 3 or any(a >= y.shape[0] or b >= y.shape[1] for a, b in places):
        return None
    return _picked(y.flatten(0, 1), [a * y.shape[1] + b for a, b in places])


def _picked(flat: Tensor, index: Sequence[int]) -> Tensor:
    if not index:
        return flat[:0]
    return flat.contiguous().view(torch.uint8)[torch.tensor(index, device=flat.device)].view(flat.dtype)


def _named(judged: Comparison, rank: int, pairs: Sequence[Pair]) -> Comparison:
    """Findings with the coordinates of the token's own rank; `rank` says where it was computed."""
    findings = []
    for f in judged.findings:
        pair = pairs[f.token or 0]
        words = f"{f.message} (of rank {pair.source})"
        findings.append(replace(f, message=words, token=pair.token, slot=pair.slot, expert=pair.expert, rank=rank))
    return replace(judged, findings=tuple(findings))
