"""One function in this process as a rank: from its own seed, with whatever it raises turned into words."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moeproof.harness.ranks import wire
from moeproof.harness.ranks.context import RankContext
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.world import rank_seed

LONGEST = 300
"""Characters of an exception's first line."""
FRAMES = 12
"""Innermost frames that are shown."""
WRAPPERS = ("ranks/record.py", "ranks/runner.py", "c10d_logger.py")
"""Files whose frames say nothing."""


@dataclass(frozen=True)
class Reply:
    """What a rank says when its function has come to an end."""

    error: str = ""
    """Name and message of the exception; empty where it returned."""
    result: bytes = b""
    stack: tuple[str, ...] = ()
    when: float = 0.0
    """Monotonic clock, which all processes of a machine share."""
    refused: bool = False
    """The exception is a ContractError."""
    broken: bool = False
    """This process cannot go on: its CUDA context is lost, or it never started."""


def run_function(
    rank: int,
    world_size: int,
    device: torch.device,
    transport: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    seed: int,
) -> Reply:
    """function(context, *arguments); `seed` is the case's."""
    own = rank_seed(seed, rank)
    torch.manual_seed(own)
    try:
        result = function(RankContext(rank, world_size, device, transport, own), *arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a collective that is only queued has not happened yet
        return Reply(result=wire.dumps(result), when=time.monotonic())
    except Exception as error:  # whatever it raises ends in a verdict
        return raised(error, _lost(device))


def raised(error: Exception, broken: bool) -> Reply:
    """An exception in words."""
    first = str(error).strip().split("\n")[0][:LONGEST] or "no message"
    return Reply(
        error=f"{type(error).__name__}: {first}",
        stack=frame_lines(traceback.extract_tb(error.__traceback__)),
        when=time.monotonic(),
        refused=isinstance(error, ContractError),
        broken=broken,
    )


def frame_lines(frames: Iterable[traceback.FrameSummary]) -> tuple[str, ...]:
    """The innermost frames, innermost last, without the wrappers around the function."""
    own = [f for f in frames if not f.filename.endswith(WRAPPERS)]
    return tuple(f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in own[-FRAMES:])


def _lost(device: torch.device) -> bool:
    """Whether the CUDA context is beyond use."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False
