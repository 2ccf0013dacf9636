"""What a function that runs on a rank is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from moeproof.harness.ranks.journal import enter_stage


@dataclass(frozen=True)
class RankContext:
    """The first argument of every function that a pool runs."""

    rank: int
    world_size: int
    device: torch.device
    transport: str
    seed: int
    """This rank's own seed; torch's generators start from it."""

    @property
    def group(self) -> dist.ProcessGroup:
        """The group of all ranks."""
        world = dist.group.WORLD
        assert world is not None, "a rank runs inside an initialised group"
        return world

    def enter(self, stage: str) -> None:
        """Say which stage begins here: the watchdog names it when this rank does not come back."""
        enter_stage(stage)
