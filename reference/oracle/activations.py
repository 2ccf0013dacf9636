"""The activations in float64, and how far float32 arithmetic may be from them.

g is the gate half, u the up half; s(x) = 1 / (1 + exp(-x)).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle.bounds import U32
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor

TINY = 2.0**-120
"""exp in float32 underflows: below this times the other factor, a result may be flushed to zero."""


def split(x: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
    """(gate, up) of pre-activations (.., 2I): halves, or even and odd columns where interleaved."""
    if act.interleaved:
        return x[..., 0::2], x[..., 1::2]
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _gelu(x: Tensor) -> Tensor:
    # erfc keeps the relative accuracy of the negative tail that 1 + erf loses.
    return 0.5 * x * torch.special.erfc(-x * 2.0**-0.5)


def _gelu_tanh(x: Tensor) -> Tensor:
    # 0.5 (1 + tanh z) = s(2z)
    return x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def _gated_silu(g: Tensor, u: Tensor, a: Activation) -> Tensor:
    if a.limit:
        g, u = g.clamp(max=a.limit), u.clamp(-a.limit, a.limit)
    return _silu(g) * u


def _swigluoai(g: Tensor, u: Tensor, a: Activation) -> Tensor:
    assert a.limit and a.alpha is not None and a.beta is not None
    g, u = g.clamp(max=a.limit), u.clamp(-a.limit, a.limit)
    return g * torch.sigmoid(a.alpha * g) * (u + a.beta)


def _swiglustep(g: Tensor, u: Tensor, a: Activation) -> Tensor:
    assert a.limit
    return _silu(g).clamp(max=a.limit) * u.clamp(-a.limit, a.limit)


def _situ(g: Tensor, u: Tensor, a: Activation) -> Tensor:
    assert a.beta
    if a.linear_beta:
        u = a.linear_beta * torch.tanh(u / a.linear_beta)
    return a.beta * torch.tanh(g / a.beta) * torch.sigmoid(g) * u


GATED: dict[str, Callable[[Tensor, Tensor, Activation], Tensor]] = {
    "silu": _gated_silu,
    "gelu": lambda g, u, a: _gelu(g) * u,
    "gelu_tanh": lambda g, u, a: _gelu_tanh(g) * u,
    "swigluoai": _swigluoai,
    "swigluoai_uninterleave": _swigluoai,
    "swiglustep": _swiglustep,
    "situ": _situ,
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu_no_mul": _silu,
    "gelu_no_mul": _gelu,
    "gelu_tanh_no_mul": _gelu_tanh,
    "relu2_no_mul": lambda x: x.clamp(min=0) ** 2,
    "relu_no_mul": lambda x: x.clamp(min=0),
}


def exact(gate_up: Tensor, act: Activation) -> Tensor:
    """float64 (.., N) -> float64 (.., I)."""
    if act.gated:
        g, u = split(gate_up, act)
        value = GATED[act.name](g, u, act)
    else:
        g, u = gate_up, torch.ones_like(gate_up)
        value = UNGATED[act.name](gate_up)
    # float64 still resolves silu(-128) = -3e-54 and 32 - silu(32) = 4e-13, enough to break a tie of the final rounding;
    # float32 gives 0 and 32, and those are the exact answers asked for.
    return torch.where(_saturated(g, u, act), g.clamp(min=0) * u, value)


def error(gate_up: Tensor, value: Tensor, act: Activation, fmt: Format, claims: Claims) -> Tensor:
    """Error of float32 arithmetic before the final rounding.

    12 u |a| for the chain of operations. The argument of exp carries a relative u, which becomes |x| u in the result:
    (|g| + ..) u |a|; alpha g carries two, its own rounding and that of alpha. The gelus add 1 to erf or tanh, which loses
    relative accuracy in the negative tail: 8 u |g||u|, half of it for an erf that is good to 2^-21 as vector libraries have
    it (torch's own CPU gelu is off by 6.25 u |g| at 2.98, measured over 2 million points of [-6, 6]). Exactly saturated gates
    (g = 0, or exp and tanh beyond float32) are exact, see _saturated.
    """
    if act.gated:
        g, u = split(gate_up, act)
    else:
        g, u = gate_up, torch.ones_like(gate_up)
    if act.name in ("relu_no_mul", "relu2_no_mul"):
        result = (2 * U32 if act.name == "relu2_no_mul" else 0.0) * value.abs()
    else:
        steepness = 1.0 if act.alpha is None else 2 * act.alpha
        result = (12 + steepness * g.abs()) * U32 * value.abs() + TINY * (1 + u.abs())
        if act.name.startswith("gelu"):
            result = result + 8 * U32 * (g * u).abs()
        if act.name == "situ":
            result = result + _situ_tanh_error(g, u, act)
        if claims.activation == "approx":
            result = result + 2.0**-11 * value.abs()
    if claims.activation == "dtype":
        result = result + _dtype_error(g, u, value, act, fmt)
    return torch.where(_saturated(g, u, act), 0.0, result)


def _dtype_error(g: Tensor, u: Tensor, value: Tensor, act: Activation, fmt: Format) -> Tensor:
    """What rounding each operation to `fmt` adds: gate, product and u + beta, one relative unit each.

    Where the argument of the sigmoid is a product too (alpha g), its rounding moves log s by up to |alpha g| (1 - s) units:
    -alpha g below zero, at most 0.28 above. A subnormal factor rounds by 2^(emin - bits - 1), times what multiplies it.
    """
    roundings = torch.full_like(g, 3 * fmt.unit)
    if act.alpha is not None:
        roundings = roundings + (act.alpha * (-g).clamp(min=0) + 0.28) * fmt.unit
    subnormal = 2.0 ** (fmt.emin - fmt.bits - 1) * (1 + g.abs()) * (1 + u.abs())
    return torch.expm1(roundings.clamp(max=10.0)) * value.abs() + subnormal


def _situ_tanh_error(g: Tensor, u: Tensor, a: Activation) -> Tensor:
    """tanh of a small argument from exponentials has an absolute error of 2 u: times each factor's scale, twice for room."""
    assert a.beta
    gate = torch.sigmoid(g)
    if not a.linear_beta:
        return 4 * U32 * a.beta * gate * u.abs()
    up = a.linear_beta * torch.tanh(u / a.linear_beta).abs()
    return 4 * U32 * a.beta * gate * (up + a.linear_beta * torch.tanh(g / a.beta).abs())


def _saturated(g: Tensor, u: Tensor, act: Activation) -> Tensor:
    """Where float32 arithmetic gives the exact product whatever the formula.

    silu and gelu of g = 0, g >= 32 or g <= -128 are 0, g and 0 exactly, in float32, for x*s(x), x/(1+exp(-x)) and the usual
    erf and tanh forms (checked over these values in the tests). The product with u is exact when it has <= 24 bits, which
    holds for 16-bit g and u.
    """
    if act.limit or act.name not in ("silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul"):
        return torch.zeros_like(g, dtype=torch.bool)
    whole = (g == torch.round(g)) & (u == torch.round(u)) & (g.abs() < 2**11) & (u.abs() < 2**12)
    return whole & ((g == 0) | (g >= 32) | (g <= -128))


def activate(gate_up: Tensor, act: Activation, fmt: Format, claims: Claims, live: Tensor | None = None) -> Value:
    """ACT, isolated: the candidate's own pre-activations (.., N) in, h (.., I) out, stored in `fmt`."""
    x = gate_up.double()
    value = exact(x, act)
    return stored(value, error(x, value, act, fmt, claims), fmt, live)
