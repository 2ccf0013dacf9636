"""A quantised MoE layer stage by stage, each tensor shown: codes and scales of both quantisations included."""

from __future__ import annotations

import torch

from moeproof.optimized.layer import finish, routing
from moeproof.optimized.quant.experts import run_experts, shown_rows
from moeproof.optimized.quant.gemm import Rows, Weights
from moeproof.optimized.quant.prepare import quantised_rows
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.quant_checks import check_inputs

Tensor = torch.Tensor


def _weights(inputs: Inputs) -> tuple[Weights, Weights]:
    """w1 and w2 with all that belongs to them, checked."""
    check_inputs(inputs)
    i, w = inputs, inputs.problem.quant.w
    assert w is not None
    assert i.w1_scale is not None and i.w2_scale is not None
    return (
        Weights(i.w1, w, i.w1_scale, i.w1_zp, i.w1_global, i.b1),
        Weights(i.w2, w, i.w2_scale, i.w2_zp, i.w2_global, i.b2),
    )


def run(inputs: Inputs) -> dict[str, Tensor]:
    """Every canonical tensor of the layer; xq, xs, hq and hs where the scheme quantises x and h.

    Experts use the case's own ids and weights. Rows of dead slots in gate_up, h, hq, hs and y are not written.
    """
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    scheme, (T, K), H = p.quant, ids.shape, p.hidden
    first, second = _weights(inputs)
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    gate_up, h, y = (torch.empty(T * K, width, dtype=x.dtype, device=x.device) for width in (p.N, p.I, H))
    out = x if p.inplace else torch.empty(T, H, dtype=x.dtype, device=x.device)

    xq, xs = quantised_rows(scheme, x, inputs.a1_scale, inputs.topk_weights, ids, p.weight_on_input)
    level = inputs.a1_scale if scheme.a1 is not None and scheme.a1.two_level else None
    rows1 = Rows(xq, scheme.a1, xs, level)
    alignment, rows2 = run_experts(rows1, first, second, slots, p.act, scheme.a2, p.fmt, inputs.a2_scale, gate_up, h, y)
    finish(inputs, slots, y, out)
    stages = {"gate_up": gate_up.unflatten(0, (T, K)), **shown_rows(h, rows2, (T, K)), "y": y.unflatten(0, (T, K)), "out": out}
    if scheme.a1 is not None:
        assert xs is not None
        stages |= {"xq": xq, "xs": xs}
    aligned = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert}
    return routing(inputs) | aligned | {"num_padded": alignment.num_padded} | stages
