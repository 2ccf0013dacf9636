"""Index width: every stage on tensors whose rows lie more than 2^31 elements apart, against the same call on small ones.

A 32-bit offset wraps to a negative one, which still lies inside the allocation: it reads a wrong place, and nothing crashes.
Memory between the rows is never touched, so that the host's is not used either.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda.activation import activate
from moeproof.optimized.cuda.align import align
from moeproof.optimized.cuda.combine import combine
from moeproof.optimized.cuda.dispatch import move_rows
from moeproof.optimized.cuda.grouped_gemm import gather
from moeproof.optimized.cuda.quantise import quantise
from moeproof.optimized.cuda.router import route
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, Router

Tensor = torch.Tensor
ROWS, GAP = 3, 2**30 + 8
"""Row 2 starts at 2^31 + 16 elements, and wraps to 2^31 - 16 before the first."""


def far_apart(x: Tensor) -> Tensor:
    """The same (3, width) values, rows GAP elements apart, in the second half of an allocation."""
    whole = torch.empty(2 * (2 * GAP + 64), dtype=x.dtype, device=x.device)
    low = whole[: 2 * GAP]
    low[:64] = low[-64:] = 0  # where a wrapped offset reads
    apart = whole.as_strided(x.shape, (GAP, 1), 2 * GAP)
    apart.copy_(x)
    return apart


def _combine(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    out = torch.empty(3, x.size(1), dtype=x.dtype, device=x.device)
    combine(x, weights, Slots(ids, 3, 3), out)
    return out


def _activate(x: Tensor) -> Tensor:
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    activate(x, h, Activation("relu_no_mul"))
    return h


def _align(ids: Tensor) -> Tensor:
    return align(Slots(ids, 3, 3), 4).sorted_slots


def _move(x: Tensor) -> Tensor:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    move_rows(x, out, 1)
    return out


def _gather(x: Tensor, alignment: Alignment) -> Tensor:
    return gather(x, alignment, 3, 1)[: 3 * 4]


def checks(device: str) -> dict[str, Callable[[], bool]]:
    """By the stage's library: does the far call agree with the near one?"""
    x = torch.arange(1, 25, device=device).view(3, 8).to(torch.bfloat16)
    ids = torch.tensor([[0], [1], [2]], dtype=torch.int32, device=device)
    weights = torch.ones(3, 1, device=device)
    rows = SCHEMES["fp8_token"].a1
    assert rows is not None

    def same(near: Callable[[Tensor], Tensor], given: Tensor) -> bool:
        return torch.equal(near(given), near(far_apart(given)))

    return {
        "combine": lambda: same(lambda y: _combine(y, ids, weights), x),
        "activation": lambda: same(_activate, x),
        "align": lambda: same(_align, ids),
        "dispatch": lambda: same(_move, x),
        "rows": lambda: same(lambda y: _gather(y, align(Slots(ids, 3, 3), 4)), x),
        "quantise": lambda: same(lambda v: quantise(v, rows, FORMATS["bf16"])[1], x),
        "router": lambda: same(lambda logits: route(logits, Router(), 2)[1], x.float()),
    }
