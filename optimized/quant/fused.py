"""The fast fp8 layer: x is quantised once, GEMM1 gathers codes and applies the activation, rows stay sorted up to GEMM2.

With scales of blocks GEMM1 quantises its own result where its tile holds whole groups; with scales of tokens a row's scale is
known only when all its columns are, so h takes one more pass. What it cannot show follows from that: gate_up and h are never
stored by slot. `layer.run` shows every stage.
"""

from __future__ import annotations

import torch

from moeproof.optimized import plans, specialised_gemm
from moeproof.optimized.align import Alignment, align
from moeproof.optimized.fused import _combine, with_roles
from moeproof.optimized.fused_gemm import describable
from moeproof.optimized.layer import routing
from moeproof.optimized.plans import Plan, Point
from moeproof.optimized.quant.fused_gemm import down, gate_up_act, requantises
from moeproof.optimized.quant.layer import _weights
from moeproof.optimized.quant.prepare import weighted_rows
from moeproof.optimized.quant.rows import code_rows, quantise_rows
from moeproof.optimized.quant.vector import vector_down, vector_gate_up_act
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.sort_rows import sort_rows
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
SCHEMES = ("fp8_token", "fp8_block")
FAST = "-fast"
"""What the tables of the weaker accumulator add to a scheme's name."""


def unsupported(problem: Problem) -> str | None:
    """Why the fused layer cannot do this problem, or None."""
    if problem.scheme not in SCHEMES:
        return f"the fused fp8 kernels are for schemes {' and '.join(SCHEMES)}, not {problem.scheme}"
    if problem.dtype == "fp32":
        return "the fused kernels are for 16-bit types; fp32 runs stage by stage"
    return None


def point(problem: Problem, local_experts: int, fast: bool = False) -> Point:
    p = problem
    return Point(p.scheme + FAST * fast, local_experts, p.slots, p.hidden, p.I, p.T)


def run(inputs: Inputs) -> dict[str, Tensor]:
    """`out` (T, H), and what else exists: xq, xs, the alignment, y (T, K, H) and the router's choice. Rows of dead slots in y
    are not written."""
    return run_plan(inputs, plans.choose(point(inputs.problem, inputs.w1.size(0)), inputs.device))


def run_fast(inputs: Inputs) -> dict[str, Tensor]:
    """`run`, where the tensor core may keep the sum of a whole product (the claim fp8_unpromoted)."""
    return run_plan(inputs, plans.choose(point(inputs.problem, inputs.w1.size(0), fast=True), inputs.device))


def run_plan(inputs: Inputs, plan: Plan) -> dict[str, Tensor]:
    """`run` by this plan, whatever the tables say."""
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    a1 = p.quant.a1
    assert a1 is not None
    _weights(inputs)  # refuses what does not fit, before any launch
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    out = x if p.inplace else torch.empty(p.T, p.H, dtype=x.dtype, device=x.device)
    plain = not (p.shared or p.router.zero_experts)
    rows = weighted_rows(x, inputs.topk_weights, ids) if p.weight_on_input else x
    xq = quantise_rows(rows, a1, overlap=plan.overlap, first=True)
    shown = {"xq": xq[0], "xs": xq[1]}
    if p.T and isinstance(plan.first, Strip) and isinstance(plan.second, Strip) and plain:
        _by_strips(inputs, xq, plan.first, plan.second, plan.overlap, slots, out)
    elif p.T:
        tiles = plan if isinstance(plan.first, Tile) else plans.fallback(Point(p.scheme, 1, 1, p.H, p.I, 2))
        shown |= _by_tiles(inputs, xq, _loadable(tiles, inputs), slots, out, direct=plain and p.slots == 1)
    return routing(inputs) | shown | {"out": out}


def _loadable(plan: Plan, inputs: Inputs) -> Plan:
    """The plan as it can run: without roles where a kernel has none, with pointers where no descriptor can name weights."""
    first = with_roles(plan.first, inputs.w1, inputs.w1_scale, inputs.problem.act, inputs.b1)
    second = with_roles(plan.second, inputs.w2, inputs.w2_scale, None, inputs.b2)
    return Plan(_tile(first, inputs.w1), _tile(second, inputs.w2), plan.overlap)


def _tile(tile: Tile | Strip, w: Tensor) -> Tile:
    assert isinstance(tile, Tile)
    if not tile.tma or describable(w):
        return tile
    # Pointers take registers that a large tile has none left of.
    return Tile(tile.block_m, min(tile.block_n, 64), 128, tile.group_m, tile.warps, 2, swap=tile.swap, fast=tile.fast)


def _by_strips(
    inputs: Inputs, xq: tuple[Tensor, Tensor], first: Strip, second: Strip, overlap: bool, slots: Slots, out: Tensor
) -> None:
    p = inputs.problem
    assert inputs.w1_scale is not None and inputs.w2_scale is not None and p.quant.a2 is not None
    h = torch.empty(slots.count, p.I, dtype=out.dtype, device=out.device)
    vector_gate_up_act(xq, (inputs.w1, inputs.w1_scale), h, slots, first, p.act, inputs.b1, overlap)
    hq = quantise_rows(h, p.quant.a2, overlap=overlap)
    weights = None if p.weight_on_input else inputs.topk_weights
    vector_down(hq, (inputs.w2, inputs.w2_scale), out, weights, slots, second, inputs.b2, p.scale_on_sum, overlap)


def _first(
    x: tuple[Tensor, Tensor],
    w1: tuple[Tensor, Tensor],
    h: tuple[Tensor, Tensor | None],
    alignment: Alignment,
    tile: Tile,
    K: int,
    act: Activation,
    dtype: torch.dtype,
    b1: Tensor | None,
    overlap: bool,
) -> None:
    if tile.roles:
        rows = sort_rows(x[0], alignment, K), x[1]
        specialised_gemm.gate_up_act(rows, w1, h, alignment, tile, K, x[0].size(0) * K, act, dtype)
    else:
        gate_up_act(x, w1, h, alignment, tile, K, act, dtype, b1, overlap)


def _second(
    h: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    out_SH: Tensor,
    alignment: Alignment,
    tile: Tile,
    b2: Tensor | None,
    weights: Tensor | None,
    overlap: bool,
) -> None:
    if tile.roles:
        specialised_gemm.down(h, w2, out_SH, alignment, tile, weights)
    else:
        down(h, w2, out_SH, alignment, tile, b2, weights, overlap)


def _by_tiles(
    inputs: Inputs, xq: tuple[Tensor, Tensor], plan: Plan, slots: Slots, out: Tensor, direct: bool
) -> dict[str, Tensor]:
    """With `direct` a token has one slot and nothing is added to it: GEMM2 weighs and writes the output itself."""
    p, first, second, overlap = inputs.problem, plan.first, plan.second, plan.overlap
    q = p.quant.a2
    assert isinstance(first, Tile) and isinstance(second, Tile) and q is not None
    assert inputs.w1_scale is not None and inputs.w2_scale is not None
    alignment = align(slots, first.block_m, overlap)
    shown = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert, "num_padded": alignment.num_padded}
    P, w1 = alignment.sorted_slots.numel(), (inputs.w1, inputs.w1_scale)
    if requantises(first, p.act, q.group[1]):
        hq = code_rows(q, P, p.I, out.device)
        _first(xq, w1, hq, alignment, first, slots.K, p.act, out.dtype, inputs.b1, overlap)
    else:
        h = torch.empty(P, p.I, dtype=out.dtype, device=out.device)
        _first(xq, w1, (h, None), alignment, first, slots.K, p.act, out.dtype, inputs.b1, overlap)
        hq = quantise_rows(h, q, alignment.num_padded, overlap)
    w2 = (inputs.w2, inputs.w2_scale)
    if direct and p.scale_on_sum == 1.0 and not p.inplace:
        # Before GEMM2: in the shadow of a tail, and never between two kernels that overlap.
        weights = None if p.weight_on_input else inputs.topk_weights[:, 0]
        clear_dead(out, slots)
        _second(hq, w2, out, alignment, second, inputs.b2, weights, False)
        return shown
    y = torch.empty(p.T, p.slots, p.H, dtype=out.dtype, device=out.device)
    _second(hq, w2, y.flatten(0, 1), alignment, second, inputs.b2, None, overlap)
    _combine(inputs, slots, y, out, overlap)
    return shown | {"y": y}
