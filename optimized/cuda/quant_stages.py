"""The quantised layer from one implementation of each stage: Triton's, this folder's, or a mix that a user chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import align as cuda_align
from moeproof.optimized.cuda import combine as cuda_combine
from moeproof.optimized.cuda import dispatch as cuda_dispatch
from moeproof.optimized.cuda import quantise as cuda_quantise
from moeproof.optimized.cuda import scaled_gemm as cuda_gemm
from moeproof.optimized.cuda import stages
from moeproof.optimized.layer import finish
from moeproof.optimized.quant import gemm, prepare, quantise
from moeproof.optimized.quant.experts import shown_rows
from moeproof.optimized.quant.gemm import Rows
from moeproof.optimized.quant.layer import _weights
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
NAMES = ("weigh", "quantise", "align", "gemm1", "requantise", "gemm2", "combine", "clear")
SEAMS = (("quantise", "gemm1"), ("align", "gemm1"), ("gemm1", "requantise"), ("requantise", "gemm2"), ("gemm2", "combine"))
"""Who hands tensors to whom."""


@dataclass(frozen=True)
class QuantStages:
    """A function for each stage. Twins have equal signatures and agree on every layout."""

    weigh: Callable[[Tensor, Tensor, Tensor], Tensor]
    quantise: Callable[..., tuple[Tensor, Tensor]]
    align: Callable[[Slots, int], Alignment]
    gemm1: Callable[..., None]
    requantise: Callable[..., tuple[Tensor, Tensor]]
    """ACT and QUANT2 in one: `quantise` with an activation."""
    gemm2: Callable[..., None]
    combine: Callable[..., None]
    clear: Callable[[Tensor, Slots], None]


TRITON = QuantStages(
    prepare.weighted_rows,
    quantise.quantise,
    stages.TRITON.align,
    gemm.grouped_scaled_gemm,
    quantise.quantise,
    gemm.grouped_scaled_gemm,
    stages.TRITON.combine,
    stages.TRITON.clear,
)
CUDA = QuantStages(
    cuda_dispatch.weighted_rows,
    cuda_quantise.quantise,
    cuda_align.align,
    cuda_gemm.scaled_grouped_gemm,
    cuda_quantise.quantise,
    cuda_gemm.scaled_grouped_gemm,
    cuda_combine.combine,
    cuda_dispatch.clear_dead,
)


def mix(cuda: tuple[str, ...]) -> QuantStages:
    """The named stages from CUDA, the others from Triton."""
    return QuantStages(*(getattr(CUDA if name in cuda else TRITON, name) for name in NAMES))


def run(inputs: Inputs, s: QuantStages) -> dict[str, Tensor]:
    """Every canonical tensor of the layer, as optimized.quant.layer.run returns them, without its router."""
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    a1, a2 = p.quant.a1, p.quant.a2
    assert a1 is not None and a2 is not None
    first, second = _weights(inputs)
    T, K = ids.shape
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    gate_up, y = (stages.rows(T * K, width, x) for width in (p.N, p.hidden))
    h = torch.empty(T * K, p.I, dtype=x.dtype, device=x.device)
    out = x if p.inplace else stages.rows(T, p.hidden, x)

    weighed = s.weigh(x, inputs.topk_weights, ids) if p.weight_on_input else x
    xq, xs = s.quantise(weighed, a1, p.fmt, inputs.a1_scale)
    alignment = s.align(slots, rows_per_block(slots.count, slots.num_experts))
    s.gemm1(Rows(xq, a1, xs), first, gate_up, alignment, K, p.fmt)
    hq, hs = s.requantise(gate_up, a2, p.fmt, inputs.a2_scale, act=p.act, slots=slots, h_RI=h)
    rows = Rows(hq, a2, hs)
    s.gemm2(rows, second, y, alignment, 1, p.fmt)
    finish(inputs, slots, y, out, s.combine)
    aligned = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert}
    canonical = {"gate_up": gate_up.unflatten(0, (T, K)), **shown_rows(h, rows, (T, K)), "y": y.unflatten(0, (T, K))}
    return {"xq": xq, "xs": xs} | aligned | {"num_padded": alignment.num_padded} | canonical | {"out": out}
