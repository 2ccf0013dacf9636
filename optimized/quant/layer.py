"""A quantised MoE layer stage by stage, each tensor shown: codes and scales of both quantisations included."""

from __future__ import annotations

import torch

from moeproof.optimized.layer import finish, routing
from moeproof.optimized.quant.experts import run_experts, shown_rows
from moeproof.optimized.quant.gemm import Rows, Weights
from moeproof.optimized.quant.prepare import quantised_rows
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.quant_checks import check_global, check_quantised, check_static_scale

Tensor = torch.Tensor


def _weights(inputs: Inputs) -> tuple[Weights, Weights]:
    """w1 and w2 with all that belongs to them, checked."""
    i, p = inputs, inputs.problem
    scheme, e = p.quant, i.w1.size(0)
    assert scheme.w is not None
    check_static_scale("a1_scale", scheme.a1, i.a1_scale, 0, i.device)
    check_quantised(
        scheme, p.fmt.dtype, (e, p.N, p.hidden, p.I), i.w1, i.w2, i.w1_scale, i.w2_scale, i.w1_zp, i.w2_zp, i.a2_scale
    )
    check_global("w1_global", scheme.w, i.w1_global, e, i.device)
    check_global("w2_global", scheme.w, i.w2_global, e, i.device)
    assert i.w1_scale is not None and i.w2_scale is not None
    return (
        Weights(i.w1, scheme.w, i.w1_scale, i.w1_zp, i.w1_global, i.b1),
        Weights(i.w2, scheme.w, i.w2_scale, i.w2_zp, i.w2_global, i.b2),
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
