"""The fast layer on mxfp4 weights: align, permute x, GEMM1 with activation, GEMM2, combine."""

from __future__ import annotations

import torch

from moeproof.optimized import plans
from moeproof.optimized.align import align
from moeproof.optimized.dispatch import weigh_input
from moeproof.optimized.fused import _combine
from moeproof.optimized.layer import routing
from moeproof.optimized.plans import Plan, Point
from moeproof.optimized.quant.layer import _weights
from moeproof.optimized.quant.packed_gemm import down, gate_up_act, permute, room
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.tiles import Tile
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
SCHEME = "mxfp4_w4a16"


def unsupported(problem: Problem) -> str | None:
    """Why this layer cannot do this problem, or None."""
    p = problem
    if p.scheme != SCHEME:
        return f"the fused four-bit kernels are for scheme {SCHEME}, not {p.scheme}"
    if p.dtype != "bf16":
        return "scales of mxfp4 need the range of bf16"
    if p.storage != "NK":
        return "words of eight codes need weights whose columns are neighbours"
    return None


def point(problem: Problem, local_experts: int) -> Point:
    p = problem
    return Point(p.scheme, local_experts, p.slots, p.hidden, p.I, p.T)


def run(inputs: Inputs) -> dict[str, Tensor]:
    """`out` (T, H), and what else exists: the alignment, y (T, K, H) and the router's choice. Rows of dead slots in y are not
    written."""
    return run_plan(inputs, plans.choose(point(inputs.problem, inputs.w1.size(0)), inputs.device))


def run_plan(inputs: Inputs, plan: Plan) -> dict[str, Tensor]:
    """`run` by this plan, whatever the tables say."""
    p, x, first, second, overlap = inputs.problem, inputs.hidden_states, plan.first, plan.second, plan.overlap
    _weights(inputs)  # refuses what does not fit, before any launch
    assert isinstance(first, Tile) and isinstance(second, Tile)
    assert inputs.w1_scale is not None and inputs.w2_scale is not None
    slots = Slots(inputs.topk_ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    out = x if p.inplace else torch.empty(p.T, p.H, dtype=x.dtype, device=x.device)
    alignment = align(slots, first.block_m, overlap)
    shown = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert, "num_padded": alignment.num_padded}
    if not p.T:
        return routing(inputs) | shown | {"out": out}
    rows = permute(weigh_input(x, inputs.topk_weights) if p.weight_on_input else x, overlap, first=p.weight_on_input)
    h = room(alignment.sorted_slots.numel(), p.I, x)
    w1, w2 = (inputs.w1, inputs.w1_scale), (inputs.w2, inputs.w2_scale)
    gate_up_act(rows, w1, h, alignment, first, (p.N, p.H), slots.K, p.act, inputs.b1, overlap)
    plain = not (p.shared or p.router.zero_experts)
    if plain and p.slots == 1 and p.scale_on_sum == 1.0 and not p.inplace:
        # A token has one slot and nothing is added to it: GEMM2 weighs and writes the output itself.
        clear_dead(out, slots)
        down(h, w2, out, alignment, second, p.I, inputs.b2, None if p.weight_on_input else inputs.topk_weights[:, 0])
        return routing(inputs) | shown | {"out": out}
    y = torch.empty(p.T, p.slots, p.H, dtype=x.dtype, device=x.device)
    down(h, w2, y.flatten(0, 1), alignment, second, p.I, inputs.b2, None, overlap)
    _combine(inputs, slots, y, out, overlap)
    return routing(inputs) | shown | {"y": y, "out": out}
