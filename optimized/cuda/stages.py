"""The layer from one implementation of each stage: Triton's, this folder's, or a mix that a user chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.optimized import activation, combine, dispatch, grouped_gemm, layer, router
from moeproof.optimized import align as sort
from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import activation as cuda_activation
from moeproof.optimized.cuda import align as cuda_align
from moeproof.optimized.cuda import combine as cuda_combine
from moeproof.optimized.cuda import dispatch as cuda_dispatch
from moeproof.optimized.cuda import grouped_gemm as cuda_gemm
from moeproof.optimized.cuda import router as cuda_router
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.inputs import Inputs

NAMES = ("route", "weigh", "align", "gemm1", "act", "gemm2", "combine", "clear")
SEAMS = (("route", "align"), ("align", "gemm1"), ("gemm1", "act"), ("act", "gemm2"), ("gemm2", "combine"))
"""Who hands tensors to whom."""


@dataclass(frozen=True)
class Stages:
    """A function for each stage, in the order of the pipeline. Twins have equal signatures and agree on every layout."""

    route: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    weigh: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    align: Callable[[Slots, int], Alignment]
    gemm1: Callable[..., None]
    act: Callable[..., None]
    gemm2: Callable[..., None]
    combine: Callable[..., None]
    clear: Callable[[torch.Tensor, Slots], None]
    """Zeros in the rows of dead slots, which the seed's interfaces want and a layer does not."""


TRITON = Stages(
    router.route,
    dispatch.weigh_input,
    sort.align,
    grouped_gemm.grouped_gemm,
    activation.activate,
    grouped_gemm.grouped_gemm,
    combine.combine,
    clear_dead,
)
CUDA = Stages(
    cuda_router.route,
    cuda_dispatch.weigh_input,
    cuda_align.align,
    cuda_gemm.grouped_gemm,
    cuda_activation.activate,
    cuda_gemm.grouped_gemm,
    cuda_combine.combine,
    cuda_dispatch.clear_dead,
)


def mix(cuda: tuple[str, ...]) -> Stages:
    """The named stages from CUDA, the others from Triton."""
    return Stages(*(getattr(CUDA if name in cuda else TRITON, name) for name in NAMES))


def routing(inputs: Inputs, stages: Stages) -> dict[str, torch.Tensor]:
    """topk_ids and topk_weights of inputs.logits; empty without logits."""
    r = inputs.problem.router
    if inputs.logits is None:
        return {}
    ids, weights = stages.route(
        inputs.logits,
        r,
        inputs.problem.K,
        inputs.correction_bias if r.bias else None,
        inputs.expert_scale if r.expert_scale else None,
        inputs.table_ids if r.table else None,
    )
    return {"topk_ids": ids, "topk_weights": weights}


def rows(count: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """Uninitialised (count, width) whose rows start on 16-byte boundaries, so that any width is moved in whole packs."""
    step = 16 // like.element_size()
    return torch.empty_strided((count, width), (-(-width // step) * step, 1), dtype=like.dtype, device=like.device)


def run(inputs: Inputs, stages: Stages) -> dict[str, torch.Tensor]:
    """Every canonical tensor of the layer, as optimized.layer.run returns them; see `rows` for their strides.

    The dense shared expert is no stage of the table: Triton's serves every mix.
    """
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    T, K, H = ids.size(0), ids.size(1), x.size(1)
    gate_up, h, y = (rows(T * K, width, x) for width in (p.N, p.I, H))
    out = x if p.inplace else rows(T, H, x)

    weighed = stages.weigh(x, inputs.topk_weights) if p.weight_on_input else x
    alignment = stages.align(slots, rows_per_block(slots.count, slots.num_experts))
    stages.gemm1(weighed, inputs.w1, gate_up, alignment, K, inputs.b1)
    stages.act(gate_up, h, p.act, slots=slots)
    stages.gemm2(h, inputs.w2, y, alignment, 1, inputs.b2)
    layer.finish(inputs, slots, y, out, stages.combine)
    aligned = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert}
    canonical = {name: t.view(T, K, t.size(1)) for name, t in (("gate_up", gate_up), ("h", h), ("y", y))}
    return routing(inputs, stages) | aligned | {"num_padded": alignment.num_padded} | canonical | {"out": out}
