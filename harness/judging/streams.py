"""A call on a side stream while the default stream is busy: work launched on the wrong stream comes too late."""

from __future__ import annotations

import torch

from moeproof.harness.judging.memory import PATTERNS, Poison, guard_inputs
from moeproof.harness.judging.run import Run
from moeproof.harness.judging.trial import Ruling, Trial, differences
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.stages import TENSORS

Tensor = torch.Tensor
BUSY_CYCLES = 2 * 10**9
"""About a second on an H100: nothing on the default stream is done before the side stream has been read."""


def on_side_stream(trial: Trial) -> Ruling | None:
    """The result on a side stream is read there at once, and must have the bits of the plain call.

    The default stream sleeps meanwhile, so a kernel launched on it runs after the reading. What does wait for the whole
    device (an allocation, a copy to the host) merely costs the second.
    """
    side = torch.cuda.Stream(device=trial.device)
    given, _ = guard_inputs(trial.inputs, PATTERNS[0], trial.device)
    torch.cuda.synchronize()
    # Code and workspaces are made on the first call; that one waits for nothing.
    with torch.cuda.stream(side), Poison(PATTERNS[0]):
        trial.candidate.run(given)
    torch.cuda.synchronize()
    given, _ = guard_inputs(trial.inputs, PATTERNS[0], trial.device)
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    with torch.cuda.stream(side):
        with Poison(PATTERNS[0]):
            returned = trial.candidate.run(given)
        shown = {"out": returned} if isinstance(returned, Tensor) else returned
        # Pinned copies enqueued here: reading them does not wait for the default stream.
        host = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for n, t in shown.items()}
    side.synchronize()
    early = {name: t.clone() for name, t in host.items()}
    torch.cuda.synchronize()
    run = Run({name: t.to(trial.inputs.device) for name, t in early.items()})
    if trial.candidate.claims.deterministic == "none":
        return trial.right(run)
    changed = differences([trial.runs[0], run], trial.inputs)
    if not changed:
        return None
    words = "on a side stream, with the default stream busy, the result is another: some work ran on the wrong stream"
    return Ruling(Outcome.FAIL, tuple(Finding(TENSORS[n], n, words) for n in changed))
