"""A whole MoE layer stage by stage, with everything the seed's interfaces have no room for: router, shared and identity
experts, scale of the sum. Returns every stage's tensor, so that each can be judged."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.optimized.activation import activate
from moeproof.optimized.combine import combine
from moeproof.optimized.dispatch import weigh_input
from moeproof.optimized.experts import run_experts
from moeproof.optimized.grouped_gemm import batched_gemm
from moeproof.optimized.router import route
from moeproof.optimized.router import unsupported as router_unsupported
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.inputs import Inputs


def routing(inputs: Inputs) -> dict[str, torch.Tensor]:
    """topk_ids and topk_weights of inputs.logits; empty without logits or where the router is not supported."""
    p = inputs.problem
    if inputs.logits is None or router_unsupported(p):
        return {}
    given = {"correction_bias": inputs.correction_bias, "expert_scale": inputs.expert_scale, "table_ids_TK": inputs.table_ids}
    used = {"correction_bias": p.router.bias, "expert_scale": p.router.expert_scale, "table_ids_TK": p.router.table}
    ids, weights = route(inputs.logits, p.router, p.K, **{name: given[name] for name, wanted in used.items() if wanted})
    return {"topk_ids": ids, "topk_weights": weights}


def shared_expert(
    x_TH: torch.Tensor, w1_NH: torch.Tensor, w2_HI: torch.Tensor, act: Activation, gate_H: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """float32 (T, H) output of a dense MLP, unrounded, and float32 (T,) logits of its gate where it has one.

    The batched GEMM with one expert, whose region holds every token.
    """
    T, (N, H), I = x_TH.size(0), w1_NH.shape, w2_HI.size(1)  # noqa: E741  (the project's letter)
    counts = torch.full((1,), T, dtype=torch.int32, device=x_TH.device)
    gate_up = torch.empty(1, T, N, dtype=x_TH.dtype, device=x_TH.device)
    h = torch.empty(1, T, I, dtype=x_TH.dtype, device=x_TH.device)
    y = torch.empty(1, T, H, dtype=torch.float32, device=x_TH.device)
    batched_gemm(x_TH[None], w1_NH[None], gate_up, counts)
    activate(gate_up[0], h[0], act)
    batched_gemm(h, w2_HI[None], y, counts)
    if gate_H is None:
        return y[0], None
    gate = torch.empty(1, T, 1, dtype=torch.float32, device=x_TH.device)
    batched_gemm(x_TH[None], gate_H[None, None], gate, counts)
    return y[0], gate.view(T)


def finish(
    inputs: Inputs, slots: Slots, y_SH: torch.Tensor, out_TH: torch.Tensor, stage: Callable[..., None] = combine
) -> None:
    """COMBINE of a layer's slots by this implementation of it, with all that the layer adds: identity and shared experts."""
    p, x = inputs.problem, inputs.hidden_states
    shared, gate = None, None
    if p.shared:
        assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
        shared, gate = shared_expert(x, inputs.shared_w1, inputs.shared_w2, p.act, inputs.shared_gate)
    stage(
        y_SH,
        inputs.topk_weights,
        slots,
        out_TH,
        weighted=not p.weight_on_input,
        scale=p.scale_on_sum,
        zero_experts=p.router.zero_experts,
        x_TH=x,
        shared_TH=shared,
        gate_T=gate,
    )


def run(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every canonical tensor of the layer. Experts use the case's own ids and weights, not those routed here.

    Rows of dead slots in gate_up, h and y are not written. `block_expert` holds local indices.
    """
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    T, K, H = ids.size(0), ids.size(1), x.size(1)
    gate_up, h, y = (torch.empty(T, K, width, dtype=x.dtype, device=x.device) for width in (p.N, p.I, H))
    out = x if p.inplace else torch.empty(T, H, dtype=x.dtype, device=x.device)

    rows = weigh_input(x, inputs.topk_weights) if p.weight_on_input else x
    alignment = run_experts(rows, inputs.w1, inputs.w2, slots, p.act, gate_up, h, y, inputs.b1, inputs.b2)
    finish(inputs, slots, y.flatten(0, 1), out)
    aligned = {"sorted_slots": alignment.sorted_slots, "block_expert": alignment.block_expert}
    stages = {"gate_up": gate_up, "h": h, "y": y, "out": out}
    return routing(inputs) | aligned | {"num_padded": alignment.num_padded} | stages
