"""Ordinary float32 arithmetic in the forms that kernels use. All of it is right, so no derived bound may reject it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from moeproof.reference.contract.activations import Activation
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
Form = Callable[[Tensor], Tensor]

SIGMOID: dict[str, Form] = {"sigmoid(x)": torch.sigmoid, "1/(1+exp(-x))": lambda x: 1 / (1 + torch.exp(-x))}
SILU: dict[str, Form] = {
    "x*sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "x/(1+exp(-x))": lambda x: x / (1 + torch.exp(-x)),
    "x*(1/(1+exp(-x)))": lambda x: x * (1 / (1 + torch.exp(-x))),
    "F.silu": F.silu,
}
GELU: dict[str, Form] = {
    "0.5x(1+erf)": lambda x: 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5))),
    "x(0.5+0.5erf)": lambda x: x * (0.5 + 0.5 * torch.erf(x / math.sqrt(2))),
    "F.gelu": F.gelu,
}
GELU_TANH: dict[str, Form] = {
    "0.5x(1+tanh)": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))),
    "x*sigmoid(2z)": lambda x: x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)),
    "factored": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x))),
    "F.gelu(tanh)": lambda x: F.gelu(x, approximate="tanh"),
}
GATES = {"silu": SILU, "gelu": GELU, "gelu_tanh": GELU_TANH, "swiglustep": SILU}
UNGATED = {
    "silu_no_mul": SILU,
    "gelu_no_mul": GELU,
    "gelu_tanh_no_mul": GELU_TANH,
    "relu_no_mul": {"relu": torch.relu},
    "relu2_no_mul": {"relu**2": lambda x: torch.relu(x) ** 2, "relu*relu": lambda x: torch.relu(x) * torch.relu(x)},
}


def forms(act: Activation) -> dict[str, Form]:
    """The forms of the one function that this activation is built on."""
    return GATES.get(act.name) or UNGATED.get(act.name) or SIGMOID


def activated(g: Tensor, u: Tensor, act: Activation, form: Form) -> Tensor:
    """The activation in the dtype of g and u, one rounding an operation."""
    if not act.gated:
        return form(g)
    limit = act.limit or 0.0
    if act.name == "swiglustep":
        return form(g).clamp(max=limit) * u.clamp(-limit, limit)
    if act.name == "situ":
        up = act.linear_beta * torch.tanh(u / act.linear_beta) if act.linear_beta else u
        return act.beta * torch.tanh(g / act.beta) * form(g) * up
    if limit:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    if act.name.startswith("swigluoai"):
        return g * form(act.alpha * g) * (u + act.beta)
    return form(g) * u


def packed(g: Tensor, u: Tensor, act: Activation) -> Tensor:
    """gate_up (.., 2I) as the activation reads it, or the gate alone where there is no up half."""
    if not act.gated:
        return g
    return torch.stack([g, u], dim=-1).flatten(-2) if act.interleaved else torch.cat([g, u], dim=-1)


def ratio(got: Tensor, want: Value) -> Tensor:
    """Observed / allowed error, elementwise; 0 where both are exactly right, inf where nothing was allowed.

    Beyond the largest finite number of the format, an infinity of the right sign is right.
    """
    assert want.bound is not None and want.fmt is not None
    got = got.double()
    over = (want.value.abs() + want.bound > want.fmt.max) & (got == torch.copysign(torch.tensor(torch.inf), want.value))
    right = over | (got == want.value)
    error = (got - want.value).abs()
    return torch.where(right, 0.0, torch.where(want.bound > 0, error / want.bound, torch.inf)).nan_to_num(nan=torch.inf)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {}
"""Ways to sum the last dim of (.., K) float32 products in float32."""


def order(name: str) -> Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]:
    def keep(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        ORDERS[name] = f
        return f

    return keep


@order("sequential")
def sequential(p: Tensor) -> Tensor:
    total = torch.zeros_like(p[..., 0])
    for column in p.unbind(-1):
        total = total + column
    return total


@order("reversed")
def backwards(p: Tensor) -> Tensor:
    return sequential(p.flip(-1))


@order("pairwise")
def pairwise(p: Tensor) -> Tensor:
    while p.shape[-1] > 1:
        if p.shape[-1] % 2:
            p = torch.cat([p, torch.zeros_like(p[..., :1])], dim=-1)
        p = p[..., 0::2] + p[..., 1::2]
    return p[..., 0]


def blocked(size: int) -> Callable[[Tensor], Tensor]:
    def add(p: Tensor) -> Tensor:
        return sequential(torch.stack([sequential(block) for block in p.split(size, dim=-1)], dim=-1))

    return add


for _size in (16, 32, 128):
    ORDERS[f"blocks of {_size}"] = blocked(_size)


@order("torch.sum")
def library(p: Tensor) -> Tensor:
    return p.sum(dim=-1)
