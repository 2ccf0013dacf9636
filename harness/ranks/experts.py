"""One rank's experts in isolation: ACT, QUANT2 and GEMM2 of the rows that the candidate itself received."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moeproof.harness.judging import quant_expect
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.expect import shapes
from moeproof.harness.judging.misround import counted
from moeproof.harness.ranks.received import Shown, at_rows, pick, received_operand
from moeproof.harness.ranks.rows import Matched
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.chain import Spread, quantised_experts, quantised_rows, spreads
from moeproof.reference.oracle.experts import gemm2
from moeproof.reference.oracle.products import decoded
from moeproof.reference.oracle.quantise import Quantised
from moeproof.reference.oracle.value import Value, stored
from moeproof.reference.ranks.alone import alone
from moeproof.reference.ranks.dispatch import Pair
from moeproof.reference.ranks.expect import RankExpectation

Tensor = torch.Tensor
KEPT = ("h", "hq", "hs", "y")
"""What the experts may show, in the coordinates of their rows."""


def judge_experts(rank: int, view: RankExpectation, shown: Shown, matched: Matched, claims: Claims) -> list[Comparison]:
    """h, hq and hs where they are shown, and y, of each received pair. Findings name the token's own rank and this one."""
    pairs = sorted(matched.places)
    places = [matched.places[pair] for pair in pairs]
    rows = at_rows(shown["rows"], places)
    here = alone(view.inputs, pairs, rows if view.operand is None else rows.new_zeros(len(pairs), 0))
    need, dtypes = shapes(here.problem, here), quant_expect.code_dtypes(here)
    a2, own = here.problem.quant.a2, dict[str, Tensor]()
    one_for_all = a2 is not None and not a2.by_token
    for name in KEPT:
        if name not in shown:
            continue
        flat = gathered(shown[name], matched, pairs)
        got = shown[name] if (name == "hs" and one_for_all) or flat is None else flat[:, None]
        dtype = dtypes.get(name, got.dtype)
        if (tuple(got.shape), got.dtype) != (need.get(name), dtype):
            words = f"is {tuple(shown[name].shape)} {got.dtype}, must give {need.get(name)} {dtype} of the received pairs"
            return [Comparison((Finding(TENSORS[name], name, words, rank=rank),), 1, 0.0)]
        own[name] = got
    if not own:
        return []
    operand = None if view.operand is None else received_operand(view, shown, places)
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
    rows = quantised_rows(here) if operand is None else decoded(operand).in_slots(1)
    return dict(zip(("gate_up", "h", "y"), quantised_experts(here, claims, rows), strict=True))


def _stored(spread: Spread, like: Tensor) -> Value:
    return stored(spread.value, spread.allowed, format_of(like.dtype))


def gathered(y: Tensor, matched: Matched, pairs: Sequence[Pair]) -> Tensor | None:
    """(n, .) of y (n, K, .) or (e, C, .): what became of each pair; None where y has no such place."""
    places = [matched.places[p] for p in pairs]
    if y.dim() != 3 or any(a >= y.shape[0] or b >= y.shape[1] for a, b in places):
        return None
    return pick(y.flatten(0, 1), [a * y.shape[1] + b for a, b in places])


def _named(judged: Comparison, rank: int, pairs: Sequence[Pair]) -> Comparison:
    """Findings with the coordinates of the token's own rank; `rank` says where it was computed."""
    findings = []
    for f in judged.findings:
        pair = pairs[f.token or 0]
        words = f"{f.message} (of rank {pair.source})"
        findings.append(replace(f, message=words, token=pair.token, slot=pair.slot, expert=pair.expert, rank=rank))
    return replace(judged, findings=tuple(findings))
