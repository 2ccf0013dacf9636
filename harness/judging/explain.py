"""What a wrong tensor looks like: one simple fault that would give every bad element, found by trying.

The hypotheses are the wrong results of the L0 gate and a few more: K tails of other tiles, truncation, other tokens' rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from moeproof.harness.judging.compare import within
from moeproof.harness.judging.expect import JUDGED, UPSTREAM
from moeproof.harness.judging.gate import SWAPPED, differs, input_of, wrong_results
from moeproof.harness.judging.rerun import Fault, rerun, without_tail
from moeproof.harness.judging.trial import Ruling, Trial
from moeproof.harness.verdict import Finding
from moeproof.reference.oracle.rounding import ulp
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor
K_TILES = (16, 32, 64, 128, 256)
VAGUE = ("10% noise",)
"""Wrong results that say nothing about a cause."""


def explained(trial: Trial, ruling: Ruling) -> Ruling:
    """The same ruling, with what explains each tensor's bad elements added to the pattern of its finding."""
    return replace(ruling, findings=tuple(_with_words(trial, finding) for finding in ruling.findings))


def _with_words(trial: Trial, finding: Finding) -> Finding:
    want = trial.wanted.get(finding.tensor)
    if want is None or not finding.bad or finding.got is None:
        return finding
    words = explain(trial, finding.tensor, want)
    return replace(finding, pattern=", ".join(filter(None, (finding.pattern, words)))) if words else finding


def explain(trial: Trial, name: str, want: Value) -> str:
    """The first hypothesis that gives all bad elements; an empty string where none does."""
    got = trial.shown[name].double()
    bad = _bad(got, want)
    for words, wrong in _hypotheses(trial, name, want):
        if _gives(got, wrong, want, bad):
            return words
    return _truncated(got, want, bad) or _moved_rows(got, want, bad)


def _bad(got: Tensor, want: Value) -> Tensor:
    comparable = ~want.value.isnan()
    if want.live is not None:
        comparable &= want.live.unsqueeze(-1)
    return comparable & ~within(got, want)


def _gives(got: Tensor, wrong: Tensor, want: Value, bad: Tensor) -> bool:
    """The wrong result differs from the right one, and an implementation of it would store every bad element so."""
    if want.fmt is None or want.error is None or not differs(wrong, want):
        return False
    value = stored(wrong, want.error, want.fmt)
    return bool((within(got, value) | ~bad).all())


def _hypotheses(trial: Trial, name: str, want: Value) -> Iterator[tuple[str, Tensor]]:
    expect, shown = trial.expect, trial.shown
    p = expect.inputs.problem
    for kind, wrong in wrong_results(name, want, shown, expect, want.value.shape[0]):
        if kind not in VAGUE and not kind.startswith("the last K tile"):
            yield (
                f"as with {kind}" if kind == SWAPPED or kind.startswith("the") else f"equal to {kind} of the right result",
                wrong,
            )
    upstream = next((n for n in UPSTREAM[name] if n in shown), None)
    first = JUDGED.index(upstream) + 1 if upstream else 0
    for broken, gemm, length in (("gate_up", "GEMM1", p.hidden), ("y", "GEMM2", p.I)):
        if first <= JUDGED.index(broken) <= JUDGED.index(name):
            start = input_of(broken, upstream, shown, expect)
            for columns in dict.fromkeys(length % tile for tile in K_TILES if 0 < length % tile < length):
                fault = Fault(broken, lambda x, n=columns: without_tail(x, n))  # type: ignore[misc]
                words = f"as with a K tail of {columns} (of {length}) left out of {gemm}"
                yield words, rerun(name, fault, start, expect.inputs, expect.claims)


def _truncated(got: Tensor, want: Value, bad: Tensor) -> str:
    if want.fmt is None:
        return ""
    step = ulp(want.value, want.fmt)
    toward_zero = torch.trunc(want.value / step) * step
    return "as with truncation instead of rounding" if bool(((got == toward_zero) | ~bad).all()) else ""


def _moved_rows(got: Tensor, want: Value, bad: Tensor) -> str:
    """Every bad row is another row of the right result."""
    if want.bound is None:
        return ""
    rows, width = bad.reshape(-1, bad.shape[-1]), bad.shape[-1]
    right, mine, bound = (t.reshape(-1, width) for t in (want.value, got, want.bound))
    slots = want.value.shape[1] if want.value.dim() == 3 else 1
    sources = []
    for row in rows.any(dim=1).nonzero().flatten().tolist():
        near = ((mine[row] - right).abs() <= bound).all(dim=1)
        near[row] = False
        if want.live is not None:
            near &= want.live.flatten()
        if not bool(near.any()):
            return ""
        sources.append((row, int(near.nonzero()[0])))
    if not sources:
        return ""
    tokens = {(row // slots, source // slots) for row, source in sources}
    here, there = sources[0][0] // slots, sources[0][1] // slots
    if len(tokens) == 1 and here != there:
        return f"token {here} holds the row of token {there}"
    return f"every bad row is another one of the right result: token {here} holds token {there}'s"
