"""The fast layer: activation in GEMM1's epilogue, rows kept in sorted order between the products, a plan for each size.

What it cannot show follows from that: gate_up is never stored, h lies in sorted order. `layer.run` shows every stage.
"""

from __future__ import annotations

import torch

from moeproof.optimized import plans, specialised_gemm
from moeproof.optimized.align import Alignment, align
from moeproof.optimized.combine import combine
from moeproof.optimized.dispatch import weigh_input
from moeproof.optimized.fused_gemm import describable, down, gate_up_act
from moeproof.optimized.layer import routing, shared_expert
from moeproof.optimized.plans import Plan, Point
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.sort_rows import sort_rows
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip, vector_down, vector_gate_up_act
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor


def unsupported(problem: Problem) -> str | None:
    """Why the fused layer cannot do this problem, or None."""
    if problem.dtype == "fp32":
        return "the fused kernels are for 16-bit types; fp32 runs stage by stage"
    return None


def point(problem: Problem, local_experts: int) -> Point:
    p = problem
    return Point(p.dtype, local_experts, p.slots, p.hidden, p.I, p.T)


def run(inputs: Inputs) -> dict[str, Tensor]:
    """`out` (T, H), and what else exists: the alignment, y (T, K, H) and the router's choice. Rows of dead slots in y are
    not written. Experts use the case's own ids and weights, not those routed here."""
    return run_plan(inputs, plans.choose(point(inputs.problem, inputs.w1.size(0)), inputs.device))


def run_plan(inputs: Inputs, plan: Plan) -> dict[str, Tensor]:
    """`run` by this plan, whatever the tables say."""
    p, x = inputs.problem, inputs.hidden_states
    slots = Slots(inputs.topk_ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    rows = weigh_input(x, inputs.topk_weights) if p.weight_on_input else x
    out = x if p.inplace else torch.empty(p.T, p.H, dtype=x.dtype, device=x.device)
    plain = not (p.shared or p.router.zero_experts)
    shown: dict[str, Tensor] = {}
    if isinstance(plan.first, Strip) and isinstance(plan.second, Strip) and plain:
        _by_strips(inputs, plan.first, plan.second, plan.overlap, slots, rows, out)
    else:
        tiles = plan if isinstance(plan.first, Tile) else plans.DECODE
        shown = _by_tiles(inputs, _loadable(tiles, inputs), slots, rows, out, direct=plain and p.slots == 1)
    return routing(inputs) | shown | {"out": out}


def _loadable(plan: Plan, inputs: Inputs) -> Plan:
    """The plan as it can run: without roles where a kernel has none, with pointers where no descriptor can name weights."""
    first = with_roles(plan.first, inputs.w1, None, inputs.problem.act, inputs.b1)
    second = with_roles(plan.second, inputs.w2, None, None, inputs.b2)
    return Plan(_tile(first, inputs.w1), _tile(second, inputs.w2), plan.overlap)


def with_roles(
    tile: Tile | Strip, w: Tensor, w_scale: Tensor | None, act: Activation | None, bias: Tensor | None
) -> Tile | Strip:
    """The tile, or where its warps cannot have roles the same sums in the same order by warps that all do the same."""
    if isinstance(tile, Tile) and tile.roles and specialised_gemm.unable(w, w_scale, act, bias):
        return Tile(tile.block_m, 128, tile.block_k, tile.group_m, 8, 4, True, 1, fast=tile.fast)
    return tile


def _tile(tile: Tile | Strip, w: Tensor) -> Tile:
    assert isinstance(tile, Tile)
    if not tile.tma or describable(w):
        return tile
    # Pointers take registers that a large tile has none left of.
    return Tile(tile.block_m, min(tile.block_n, 128), min(tile.block_k, 64), tile.group_m, tile.warps, 3)


def _by_strips(inputs: Inputs, first: Strip, second: Strip, overlap: bool, slots: Slots, rows: Tensor, out: Tensor) -> None:
    p = inputs.problem
    if not p.T:
        return
    h = torch.empty(slots.count, p.I, dtype=rows.dtype, device=rows.device)
    vector_gate_up_act(rows, inputs.w1, h, slots, first, p.act, inputs.b1, overlap)
    vector_down(
        h, inputs.w2, out, inputs.topk_weights, slots, second, inputs.b2, not p.weight_on_input, p.scale_on_sum, overlap
    )


def _by_tiles(inputs: Inputs, plan: Plan, slots: Slots, rows: Tensor, out: Tensor, direct: bool) -> dict[str, Tensor]:
    """With `direct` a token has one slot and nothing is added to it: GEMM2 weighs and writes the output itself."""
    p, first, second = inputs.problem, plan.first, plan.second
    assert isinstance(first, Tile) and isinstance(second, Tile)
    alignment = align(slots, first.block_m, plan.overlap)
    shown = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert, "num_padded": alignment.num_padded}
    if not p.T:
        return shown
    h = torch.empty(alignment.sorted_slots.numel(), p.I, dtype=rows.dtype, device=rows.device)
    if first.roles:
        ordered = sort_rows(rows, alignment, slots.K)
        sizes = slots.K, slots.count
        specialised_gemm.gate_up_act((ordered, None), (inputs.w1, None), (h, None), alignment, first, *sizes, p.act, h.dtype)
    else:
        gate_up_act(rows, inputs.w1, h, alignment, first, slots.K, p.act, inputs.b1, plan.overlap)
    if direct and p.scale_on_sum == 1.0 and not p.inplace:
        # Before GEMM2: in the shadow of a tail, and never between two kernels that overlap.
        weights = None if p.weight_on_input else inputs.topk_weights[:, 0]
        clear_dead(out, slots)
        _second(h, inputs, out, alignment, second, weights, False)
        return shown
    y = torch.empty(p.T, p.slots, p.H, dtype=rows.dtype, device=rows.device)
    _second(h, inputs, y.flatten(0, 1), alignment, second, None, plan.overlap)
    _combine(inputs, slots, y, out, plan.overlap)
    return shown | {"y": y}


def _second(
    h: Tensor, inputs: Inputs, out_SH: Tensor, alignment: Alignment, tile: Tile, weights: Tensor | None, overlap: bool
) -> None:
    if tile.roles:
        specialised_gemm.down((h, None), (inputs.w2, None), out_SH, alignment, tile, weights)
    else:
        down(h, inputs.w2, out_SH, alignment, tile, inputs.b2, weights, overlap)


def _combine(inputs: Inputs, slots: Slots, y: Tensor, out: Tensor, overlap: bool) -> None:
    p, x = inputs.problem, inputs.hidden_states
    shared, gate = None, None
    if p.shared:
        assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
        shared, gate = shared_expert(x, inputs.shared_w1, inputs.shared_w2, p.act, inputs.shared_gate)
        overlap = False  # the shared expert's kernels lie between GEMM2 and this one
    combine(
        y.flatten(0, 1),
        inputs.topk_weights,
        slots,
        out,
        weighted=not p.weight_on_input,
        scale=p.scale_on_sum,
        zero_experts=p.router.zero_experts,
        x_TH=x,
        shared_TH=shared,
        gate_T=gate,
        overlap=overlap,
    )
