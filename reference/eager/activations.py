"""The activations in float32, written as the models write them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check

Tensor = torch.Tensor


def _sigmoid(x: Tensor) -> Tensor:
    return 1.0 / (1.0 + torch.exp(-x))


def _silu(x: Tensor) -> Tensor:
    return x / (1.0 + torch.exp(-x))


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _relu2(x: Tensor) -> Tensor:
    return torch.relu(x) * torch.relu(x)


def _gated(gate: Tensor, up: Tensor, act: Activation) -> Tensor:
    """The gated ones. A clamp bounds the gate from above only and the up half on both sides."""
    limit = act.limit or 0.0
    alpha = 1.0 if act.alpha is None else act.alpha
    beta = 0.0 if act.beta is None else act.beta
    if act.name == "gelu":
        return _gelu(gate) * up
    if act.name == "gelu_tanh":
        return _gelu_tanh(gate) * up
    if act.name == "swiglustep":
        return torch.clamp(_silu(gate), max=limit) * torch.clamp(up, -limit, limit)
    if act.name == "situ":
        capped = act.linear_beta * torch.tanh(up / act.linear_beta) if act.linear_beta else up
        return beta * torch.tanh(gate / beta) * _sigmoid(gate) * capped
    if limit:
        gate, up = torch.clamp(gate, max=limit), torch.clamp(up, -limit, limit)
    if act.name == "silu":
        return _silu(gate) * up
    return gate * _sigmoid(alpha * gate) * (up + beta)  # swigluoai, interleaved or not


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": _silu,
    "gelu_no_mul": _gelu,
    "gelu_tanh_no_mul": _gelu_tanh,
    "relu_no_mul": torch.relu,
    "relu2_no_mul": _relu2,
}


def activate(gate_up: Tensor, act: Activation) -> Tensor:
    """Pre-activations (.., N), any floating dtype -> float32 (.., I); the caller rounds to what it stores.

    Gated activations read N = 2I columns, packed halves (gate first) or gate and up in turn where interleaved.
    """
    x = gate_up.float()
    if not act.gated:
        return _UNGATED[act.name](x)
    check(x.size(-1) % 2 == 0, f"activation '{act}' is gated: {x.size(-1)} columns do not split into gate and up")
    if act.interleaved:
        pairs = x.unflatten(-1, (-1, 2))
        return _gated(pairs[..., 0], pairs[..., 1], act)
    half = x.size(-1) // 2
    return _gated(x[..., :half], x[..., half:], act)
