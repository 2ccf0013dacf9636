"""The whole MoE layer stage by stage, in canonical (token, slot) coordinates: everything a Problem can ask for.

    out = scale_on_sum * (sum over live slots of w * y + sum over identity slots of w * x) + shared(x) * sigmoid(x . gate)

Each stage is float32 arithmetic rounded once to the problem's dtype; `out` is summed in float32 and rounded once.
"""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.quant_checks import check_inputs
from moeproof.reference.eager import quant_layer
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.experts import matmul
from moeproof.reference.eager.router import route
from moeproof.reference.eager.slots import local_ids, weighted_input

Tensor = torch.Tensor
NORM_EPS = 1e-6
"""Epsilon of the latent RMSNorm."""


def _local(inputs: Inputs) -> Tensor:
    """int64 (T, K): local expert of each slot; -1 where not routed, remote, or an identity expert."""
    p = inputs.problem
    identity = (inputs.topk_ids >= p.E) & (inputs.topk_ids < p.E + p.router.zero_experts)
    return local_ids(torch.where(identity, -1, inputs.topk_ids), p.weight_experts, inputs.expert_map)


def _identity_sum(inputs: Inputs) -> Tensor:
    """float32 (T, H): what slots routed to identity experts add, weight * x."""
    p, ids = inputs.problem, inputs.topk_ids
    identity = (ids >= p.E) & (ids < p.E + p.router.zero_experts)
    weight = torch.where(identity, inputs.topk_weights.float(), 0.0).sum(dim=1, keepdim=True)
    return weight * inputs.hidden_states.float()


def _shared(inputs: Inputs) -> Tensor:
    """float32 (T, H): the shared expert of the layer's own input, times its gate where it has one."""
    p, x = inputs.problem, inputs.hidden_states
    assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
    gate_up = matmul(x, inputs.shared_w1).to(x.dtype)
    y = matmul(activate(gate_up, p.act).to(x.dtype), inputs.shared_w2).to(x.dtype).float()
    if inputs.shared_gate is not None:
        y = y * torch.sigmoid(x.float() @ inputs.shared_gate.float())[:, None]
    return y


def _out_of_latent(inputs: Inputs, total_TL: Tensor) -> Tensor:
    """float32 (T, H) of the routed sum (T, latent): RMSNorm where the model has one, then the up-projection."""
    p = inputs.problem
    assert inputs.latent_up is not None
    total = total_TL.to(p.fmt.dtype)
    if p.latent_norm:
        assert inputs.latent_norm is not None
        x = total.float()
        scale = torch.rsqrt((x * x).mean(dim=1, keepdim=True) + NORM_EPS)
        total = (x * scale * inputs.latent_norm.float()).to(p.fmt.dtype)
    return matmul(total, inputs.latent_up)


def run(inputs: Inputs) -> dict[str, Tensor]:
    """Canonical tensors of one call: gate_up (T, K, N), h (T, K, I), y (T, K, H), out (T, H), in the problem's dtype.

    The experts use inputs.topk_ids and topk_weights. topk_ids int32 and topk_weights float32, shown where there are
    logits, are this folder's own ROUTE of them. Rows of slots that are not live are zero. With ep > 1 the routed part is
    this rank's partial sum. With `inplace` out is hidden_states itself, overwritten.
    """
    p, x = inputs.problem, inputs.hidden_states
    dtype, local_TK = p.fmt.dtype, _local(inputs)
    live_TK = local_TK >= 0
    T, K = local_TK.shape
    shows: dict[str, Tensor] = {}
    if inputs.logits is not None:
        shows["topk_ids"], shows["topk_weights"] = route(inputs)
    source = x
    if p.latent:
        assert inputs.latent_down is not None
        source = matmul(x, inputs.latent_down).to(dtype)
    if p.weight_on_input:
        # Quantising comes before dispatch: there a token counts wherever its expert lives.
        routed = inputs.topk_ids >= 0 if p.quant.quantised else live_TK
        source = weighted_input(source, inputs.topk_weights, torch.where(routed, inputs.topk_ids, -1))
    if p.quant.quantised:
        check_inputs(inputs)
        shows |= quant_layer.run(inputs, source, local_TK)
        return shows | {"out": _finish(inputs, shows["y"], live_TK)}
    gate_up = torch.zeros(T, K, p.N, dtype=dtype, device=x.device)
    h = torch.zeros(T, K, p.I, dtype=dtype, device=x.device)
    y = torch.zeros(T, K, p.hidden, dtype=dtype, device=x.device)
    for expert in range(inputs.w1.size(0)):
        rows = local_TK == expert
        if not bool(rows.any()):
            continue
        b1 = None if inputs.b1 is None else inputs.b1[expert]
        b2 = None if inputs.b2 is None else inputs.b2[expert]
        gate_up[rows] = matmul(source[rows.nonzero()[:, 0]], inputs.w1[expert], b1).to(dtype)
        h[rows] = activate(gate_up[rows], p.act).to(dtype)
        y[rows] = matmul(h[rows], inputs.w2[expert], b2).to(dtype)
    return shows | {"gate_up": gate_up, "h": h, "y": y, "out": _finish(inputs, y, live_TK)}


def _finish(inputs: Inputs, y: Tensor, live_TK: Tensor) -> Tensor:
    """COMBINE of y (T, K, .): weigh, sum, and everything that comes after the experts."""
    p, x = inputs.problem, inputs.hidden_states
    T, K = live_TK.shape
    total = torch.zeros(T, p.hidden, dtype=torch.float32, device=x.device)
    for slot in range(K):
        term = y[:, slot].float()
        if not p.weight_on_input:
            term = term * inputs.topk_weights[:, slot, None].float()
        total += torch.where(live_TK[:, slot, None], term, 0.0)
    if p.router.zero_experts:
        total += _identity_sum(inputs)
    total = total * p.scale_on_sum
    if p.latent:
        total = _out_of_latent(inputs, total)
    if p.shared:
        total = total + _shared(inputs)
    out = total.to(p.fmt.dtype)
    return x.copy_(out) if p.inplace else out
