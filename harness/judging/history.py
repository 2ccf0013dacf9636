"""History: what happened before, beside and since the call must not show in its result.

`interleave` runs anywhere. `stream` and `graph` need a GPU; elsewhere they are UNSUPPORTED, with that reason.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.graphs import replay_graph
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.judging.run import run_once
from moeproof.harness.judging.streams import on_side_stream
from moeproof.harness.judging.trial import Check, Ruling, Trial, differences, failed
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.stages import TENSORS

ON_GPU = ("stream", "graph")


def cannot_remember(case: Case, device: str, backend: str = "torch") -> str | None:
    """Why the case's history cannot be run here, or None."""
    if case.history in ON_GPU and not device.startswith("cuda"):
        return f"history={case.history} needs an NVIDIA GPU, and this runs on {device}"
    if case.huge and not device.startswith("cuda") and (backend != "torch" or sys.platform == "win32"):
        return "huge=1 spreads tensors over 60 GB: beside plain torch on Linux and macOS it needs an NVIDIA GPU of 80 GB"
    return None


def others(case: Case) -> Iterator[Case]:
    """Cases to run in between: other data and routing; the same shapes with another activation; another batch size.

    What is cached under a key that lacks one of these is used again where it does not belong.
    """
    quiet = replace(case, relation="none", history="none")
    yield replace(quiet, seed=case.seed + 1)
    for name in ("gelu", "silu") if case.problem.act.gated else ("relu_no_mul", "silu_no_mul"):
        if name != case.problem.act.name:
            yield from _possible(quiet, act=Activation(name, interleaved=case.problem.act.interleaved))
            break
    yield from _possible(quiet, T=case.problem.T + 3)


def _possible(case: Case, **changes: object) -> Iterator[Case]:
    """The changed case, unless the recipe forbids it."""
    try:
        yield case.with_problem(**changes)
    except ContractError:
        return


def interleave(trial: Trial) -> Ruling | None:
    """The same call after other cases gives the same bits; or right values, where the bits may differ."""
    for other in others(trial.case):
        if trial.candidate.supports(other.problem) is None:
            between = run_once(trial.candidate, make_inputs(other, trial.device), PATTERNS[1])
            if between.refused and other.routing == "beyond":
                continue  # as it may; few tokens may have had no such id themselves
            if ruling := failed(between):
                return replace(ruling, reason=f"{ruling.reason} (in between, on {other})" if ruling.reason else "")
    again = trial.again(trial.inputs, PATTERNS[0])
    if ruling := failed(again):
        return ruling
    if trial.candidate.claims.deterministic == "none":
        return trial.right(again)
    changed = differences([trial.runs[0], again], trial.inputs)
    if changed:
        words = "the same call gives another result once other cases have run in between"
        return Ruling(Outcome.FAIL, tuple(Finding(TENSORS[n], n, words) for n in changed))
    return None


HISTORY_CHECKS: dict[str, Check | None] = {
    "none": None,
    "interleave": interleave,
    "stream": on_side_stream,
    "graph": replay_graph,
}
