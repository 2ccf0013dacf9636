"""The layer on torch's own grouped product (CUTLASS on CUDA): sort, gather, two products, scatter, combine.

An independent second implementation: it shares no code with the Triton path.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

_grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
"""Public since torch 2.10; `torch._grouped_mm` before."""
ALIGNMENT = 16
"""Bytes: rows of every operand must be whole multiples of it."""


def unsupported(problem: Problem) -> str | None:
    """Why torch's grouped product cannot do this problem on this machine, or None."""
    p = problem
    if _grouped_mm is None:
        return "this torch has no grouped_mm"
    if p.expert_bias:
        return "torch's grouped product adds no bias before it rounds"
    if torch.cuda.is_available() and p.dtype != "bf16":
        return f"torch's grouped product is bf16 only on CUDA, not {p.dtype}"
    for name, width in (("H", p.H), ("I", p.I), ("N", p.N)):
        if width * p.fmt.dtype.itemsize % ALIGNMENT:
            return f"torch's grouped product needs rows of whole {ALIGNMENT} bytes; {name}={width} in {p.dtype} is not"
    return None


def activation(x: torch.Tensor, act: Activation) -> torch.Tensor:
    """float32 (.., I) of float32 pre-activations (.., N)."""
    name, alpha, beta, limit = act.name, act.alpha, act.beta, act.limit
    simple: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": F.silu,
        # erfc keeps the tail near -4, of which 1 + erf, as F.gelu has it on the CPU, loses three digits.
        "gelu": lambda g: 0.5 * g * torch.special.erfc(g * -(2.0**-0.5)),
        "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda g: F.relu(g).square(),
    }
    if not act.gated:
        return simple[name.removesuffix("_no_mul")](x)
    gate, up = (x[..., 0::2], x[..., 1::2]) if act.interleaved else x.chunk(2, dim=-1)
    if name in ("swigluoai", "swigluoai_uninterleave"):
        gate = gate.clamp(max=limit)
        return gate * torch.sigmoid(alpha * gate) * (up.clamp(-limit, limit) + beta)  # type: ignore[operator]
    if name == "swiglustep":
        return F.silu(gate).clamp(max=limit) * up.clamp(-limit, limit)  # type: ignore[operator]
    if name == "situ":
        if act.linear_beta:
            up = act.linear_beta * torch.tanh(up / act.linear_beta)
        return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up  # type: ignore[operator]
    if limit:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return simple[name](gate) * up


def _local_experts(inputs: Inputs) -> torch.Tensor:
    """int64 (T, K): local expert of each slot; e, one past the last, where it is dead."""
    ids, e, num_experts = inputs.topk_ids.long(), inputs.w1.size(0), inputs.problem.weight_experts
    dead = (ids < 0) | (ids >= num_experts)
    if inputs.expert_map is not None:
        local = inputs.expert_map.long()[ids.masked_fill(dead, 0)]
        dead = dead | (local < 0)
        ids = local
    return ids.masked_fill(dead, e)


def _shared(inputs: Inputs) -> torch.Tensor:
    """float32 (T, H): the shared expert, times its gate."""
    assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
    x = inputs.hidden_states.float()
    y = activation(x @ inputs.shared_w1.float().T, inputs.problem.act) @ inputs.shared_w2.float().T
    return y if inputs.shared_gate is None else y * torch.sigmoid(x @ inputs.shared_gate.float())[:, None]


def finish(inputs: Inputs, weights_TK: torch.Tensor, y_TKH: torch.Tensor) -> torch.Tensor:
    """out (T, H): the weighted sum, what identity and shared experts add to it, rounded once; x itself where it is inplace."""
    p, x = inputs.problem, inputs.hidden_states
    out = (weights_TK[:, :, None] * y_TKH.float()).sum(dim=1)
    if p.router.zero_experts:
        identity = (inputs.topk_ids >= p.E) & (inputs.topk_ids < p.E + p.router.zero_experts)
        out += torch.where(identity, inputs.topk_weights.float(), 0.0).sum(dim=1, keepdim=True) * x.float()
    out *= p.scale_on_sum
    if p.shared:
        out += _shared(inputs)
    return x.copy_(out) if p.inplace else out.to(x.dtype)


def product(rows: torch.Tensor, w_eNK: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """rows (R, K) @ w[g].T for each group g of rows, which ends before row ends[g] (int32 (e,)); later rows are undefined."""
    return _grouped_mm(rows.contiguous(), w_eNK.transpose(-2, -1), offs=ends)  # type: ignore[misc]


def batched_product(rows_eCK: torch.Tensor, w_eNK: torch.Tensor) -> torch.Tensor:
    """(e, C, N): rows[g] @ w[g].T for each group g."""
    return _grouped_mm(rows_eCK.contiguous(), w_eNK.transpose(-2, -1))  # type: ignore[misc]


def run(inputs: Inputs) -> dict[str, torch.Tensor]:
    """gate_up, h, y (T, K, .) and out (T, H). Rows of dead slots are zeros."""
    p, x = inputs.problem, inputs.hidden_states
    (T, K), e = inputs.topk_ids.shape, inputs.w1.size(0)
    local_TK = _local_experts(inputs)
    live_TK = local_TK < e
    # Dead slots sort behind the last group; the products ignore what lies beyond the last offset.
    order = torch.argsort(local_TK.flatten(), stable=True)
    offsets = torch.searchsorted(local_TK.flatten()[order], torch.arange(e, device=x.device), right=True).to(torch.int32)

    def by_slot(sorted_rows: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(sorted_rows)
        out[order] = sorted_rows
        return torch.where(live_TK.flatten()[:, None], out, 0.0).to(x.dtype).view(T, K, sorted_rows.size(1))

    rows = x[order // K]
    weights = torch.where(live_TK, inputs.topk_weights.float(), 0.0)
    if p.weight_on_input:
        # In float64 the product is exact.
        rows = (rows.double() * weights.flatten()[order].double()[:, None]).to(x.dtype)
        weights = live_TK.float()
    gate_up = product(rows, inputs.w1, offsets) if T else rows.new_empty(0, p.N)
    h = activation(gate_up.float(), p.act).to(x.dtype)
    y = product(h, inputs.w2, offsets) if T else rows.new_empty(0, x.size(1))
    gate_up, h, y = by_slot(gate_up), by_slot(h), by_slot(y)
    return {"gate_up": gate_up, "h": h, "y": y, "out": finish(inputs, weights, y)}
