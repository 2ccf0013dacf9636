"""CUDA-graph capture, and replay with other inputs: whatever the host decided at capture is decided for ever."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.memory import PATTERNS, dirty, fill, guard_inputs
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
    """Capture once; each replay with other inputs must have the bits of a plain call on those inputs."""
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
    for turn in range(REPLAYS):
        inputs = _other(trial, turn)
        plain = run_once(trial.candidate, inputs, PATTERNS[0])
        if ruling := failed(plain):
            return ruling
        load(static, inputs)
        if not trial.case.problem.inplace:
            for t in shown.values():
                if t.is_contiguous():
                    fill(t, PATTERNS[turn % len(PATTERNS)])  # a replay that writes nothing must not look right
        dirty(static.device)
        graph.replay()
        torch.cuda.synchronize()
        run = Run({name: t.clone() for name, t in shown.items()})
        changed = differences([plain, run], inputs)
        if changed and trial.candidate.claims.deterministic != "none":
            words = f"replay {turn + 1} of a captured call, on other inputs, is not what a plain call on them gives"
            return Ruling(Outcome.FAIL, tuple(Finding(TENSORS[n], n, words) for n in changed))
    return None


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
