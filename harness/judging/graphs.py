"""CUDA-graph capture, and replay with other inputs: whatever the host decided at capture is decided for ever."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.churn import canaries, trampled
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.judging.memory import PATTERNS, fill, guard_inputs
from moeproof.harness.judging.run import Run, run_once
from moeproof.harness.judging.trial import Ruling, Trial, differences, failed
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS

Tensor = torch.Tensor
WARM_UP = 3
REPLAYS = 12
"""Flags that are not reset show on the second replay; staging slots that are used in turn, within a dozen."""
ROUTINGS = ("uniform", "none", "hot_first", "minus1")
"""What the replays route: balanced, nothing at all, everything to one expert, with holes."""


def replay_graph(trial: Trial) -> Ruling | None:
    """Capture once; each replay with other inputs must have the bits of a plain call on those inputs.

    Between replays all memory that is free changes its owner (churn.py).
    """
    static, _ = guard_inputs(trial.inputs, PATTERNS[0], trial.device)
    side = torch.cuda.Stream(device=trial.device)
    side.wait_stream(torch.cuda.current_stream(trial.device))  # the inputs are written there
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                trial.candidate.run(static)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=side):
            returned = trial.candidate.run(static)
    except Exception as error:  # a candidate that asks the host cannot be captured: that is a limit, not a fault
        torch.cuda.synchronize()
        first = str(error).strip().split("\n")[0]
        return Ruling(Outcome.UNSUPPORTED, reason=f"cannot be captured in a CUDA graph: {first}")
    shown = {"out": returned} if isinstance(returned, Tensor) else dict(returned)
    # All plain calls first: one just before a replay would leave in the candidate's own memory what that replay must compute.
    plain: list[Run] = []
    for turn in range(REPLAYS):
        plain.append(run_once(trial.candidate, _other(trial, turn), PATTERNS[0]))
        if ruling := failed(plain[-1]):
            return ruling
    for turn, wanted in enumerate(plain):
        inputs = _other(trial, turn)
        load(static, inputs)
        if not trial.case.problem.inplace:
            for t in shown.values():
                if t.is_contiguous():
                    fill(t, PATTERNS[turn % len(PATTERNS)])  # a replay that writes nothing must not look right
        held = canaries(static.device)
        graph.replay()
        torch.cuda.synchronize()
        run = Run({name: t.clone() for name, t in shown.items()})
        if ruling := _replayed(trial, turn + 1, inputs, wanted, run) or _trampled(turn + 1, held):
            return ruling
    return None


def _replayed(trial: Trial, number: int, inputs: Inputs, wanted: Run, run: Run) -> Ruling | None:
    """The bits of the plain call; or right values, where the bits may differ."""
    if trial.candidate.claims.deterministic == "none":
        results, _ = judge_shown(run.shown, Expectation(inputs, trial.candidate.claims))
        found = tuple(f for r in results.values() for f in r.findings)
        words = f"(replay {number} of a captured call)"
        return Ruling(Outcome.FAIL, tuple(replace(f, message=f"{f.message} {words}") for f in found)) if found else None
    words = f"replay {number} of a captured call, on other inputs, is not what a plain call on them gives"
    changed = differences([wanted, run], inputs)
    return Ruling(Outcome.FAIL, tuple(Finding(TENSORS[n], n, words) for n in changed)) if changed else None


def _trampled(number: int, held: list[Tensor]) -> Ruling | None:
    """What the graph captured of a freed block it writes to somebody else's memory."""
    if not (count := trampled(held)):
        return None
    words = f"replay {number} of a captured call wrote {count} bytes of memory that was free after the capture"
    return Ruling(Outcome.FAIL, (Finding(None, "memory", words),))


def _other(trial: Trial, turn: int) -> Inputs:
    """Inputs of the same shapes: other data, and another routing where the case's K and E allow it."""
    case = replace(trial.case, seed=trial.case.seed + 1 + turn, relation="none", history="none")
    routing = ROUTINGS[turn % len(ROUTINGS)]
    if case.problem.routed_ids >= case.problem.K and case.routing != "router":
        case = replace(case, routing=routing)
    return make_inputs(case, trial.device)


def load(static: Inputs, inputs: Inputs) -> None:
    """Overwrite the captured inputs in place."""
    new = dict(inputs.tensors())
    for name, t in static.tensors():
        t.copy_(new[name])
