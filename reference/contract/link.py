"""What an implementation may use to reach the other ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Tensor = torch.Tensor
Wait = Callable[[], Tensor]
"""Blocks until the exchange is complete and returns what arrived."""


class Link(Protocol):
    """The ranks of one world. Every method is a collective: all ranks call the same ones in the same order.

    Over torch.distributed (`group` is its process group) or between threads of one process (`group` is None). Optimized
    implementations take `group` and use their own transport; those of reference/ use the methods below.
    """

    rank: int
    size: int
    device: torch.device
    """Where tensors must lie to be exchanged."""
    group: torch.distributed.ProcessGroup | None

    def all_gather(self, x: Tensor) -> Tensor:
        """(R, *x.shape) of equal shapes and dtypes; bytes, floats or int64."""

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        """Start sending consecutive rows (n, ..), send[r] of them to rank r, and receiving receive[r] from it.

        Received rows stand in rank order. The buffer is filled with 0xFF before anything arrives.
        """

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """x (R, ..) float32: element r summed over the ranks goes to rank r."""
