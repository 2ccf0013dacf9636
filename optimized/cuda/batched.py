"""The seed's interfaces in the batched layout, from one implementation of each stage: Triton's, this folder's, or a mix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.optimized import activation, combine, dispatch, grouped_gemm
from moeproof.optimized import align as sort
from moeproof.optimized.cuda import activation as cuda_activation
from moeproof.optimized.cuda import align as cuda_align
from moeproof.optimized.cuda import combine as cuda_combine
from moeproof.optimized.cuda import dispatch as cuda_dispatch
from moeproof.optimized.cuda import grouped_gemm as cuda_gemm
from moeproof.optimized.experts import TritonBatchedExperts
from moeproof.optimized.prepare_finalize import TritonBatchedPrepareFinalize
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.activations import Activation

Tensor = torch.Tensor
NAMES = ("place", "move", "gemm1", "act", "gemm2", "combine")
SEAMS = (("place", "move"), ("move", "gemm1"), ("gemm1", "act"), ("act", "gemm2"), ("gemm2", "combine"))
"""Who hands tensors to whom."""


@dataclass(frozen=True)
class BatchedStages:
    """A function for each stage. Twins have equal signatures and agree on every layout."""

    place: Callable[[Slots, int], tuple[Tensor, Tensor]]
    """Each slot's row, and each expert's count."""
    move: Callable[..., None]
    gemm1: Callable[..., None]
    act: Callable[..., None]
    gemm2: Callable[..., None]
    combine: Callable[..., None]


TRITON = BatchedStages(
    sort.batch_rows,
    dispatch.move_rows,
    grouped_gemm.batched_gemm,
    activation.activate,
    grouped_gemm.batched_gemm,
    combine.combine,
)
CUDA = BatchedStages(
    cuda_align.batch_rows,
    cuda_dispatch.move_rows,
    cuda_gemm.batched_gemm,
    cuda_activation.activate,
    cuda_gemm.batched_gemm,
    cuda_combine.combine,
)


def mix(cuda: tuple[str, ...]) -> BatchedStages:
    """The named stages from CUDA, the others from Triton."""
    return BatchedStages(*(getattr(CUDA if name in cuda else TRITON, name) for name in NAMES))


class StagedBatchedPrepareFinalize(TritonBatchedPrepareFinalize):
    """Each local expert has a region of `max_rows` rows, valid rows first, in slot order."""

    def __init__(self, chosen: BatchedStages, max_rows: int, num_local_experts: int, max_num_tokens: int | None = None) -> None:
        super().__init__(max_rows, num_local_experts, max_num_tokens)
        self._place, self._move, self._combine = chosen.place, chosen.move, chosen.combine


class StagedBatchedExperts(TritonBatchedExperts):
    """(e, max_tokens, K) in and out. Rows beyond an expert's count reach no other row."""

    def __init__(
        self, chosen: BatchedStages, b1: Tensor | None = None, b2: Tensor | None = None, act: Activation | None = None
    ) -> None:
        super().__init__(b1, b2, act)
        self._gemm1, self._activate, self._gemm2 = chosen.gemm1, chosen.act, chosen.gemm2
