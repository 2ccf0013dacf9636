"""A captured graph's stand-in on the CPU: one pipeline that repeats its call on the same tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.harness.faults.pipeline import Pipeline
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor


class Replayed(Pipeline):
    """What the host decides at capture is frozen; what the device decides is decided anew at each replay."""

    def capture(self, inputs: Inputs) -> Callable[[], dict[str, Tensor]]:
        """Runs once, as a capture does to warm up; the function it returns replays."""
        self(inputs)
        return lambda: self(inputs)

    def frozen(self, name: str, value: Tensor) -> Tensor:
        """The value that was there when the host first asked for it."""
        return self.memory.setdefault(name, value.clone())
