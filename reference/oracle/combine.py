"""COMBINE in float64: weigh, sum over slots, scale, add the identity and shared terms."""

from __future__ import annotations

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle.bounds import U32, combine_error
from moeproof.reference.oracle.experts import live_slots
from moeproof.reference.oracle.rounding import lowest_bit, quanta
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor


def slot_weights(inputs: Inputs) -> Tensor:
    """float64 (T, K): weights that COMBINE applies; exactly 0 where the slot is not live, 1 where they were on the input."""
    live = live_slots(inputs)
    weights = torch.ones_like(inputs.topk_weights) if inputs.problem.weight_on_input else inputs.topk_weights
    return torch.where(live, weights.double(), 0.0)


def identity_weights(inputs: Inputs) -> Tensor:
    """float64 (T,): total weight of a token's slots that are routed to identity (zero) experts."""
    p = inputs.problem
    ids = inputs.topk_ids
    zero = (ids >= p.E) & (ids < p.E + p.router.zero_experts)
    return torch.where(zero, inputs.topk_weights.double(), 0.0).sum(dim=1)


def routed_sum(inputs: Inputs, y_TKH: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
    """(exact, magnitude, quantum): sum over live slots of w * y, and over identity slots of w * x; float64 (T, H)."""
    w = slot_weights(inputs)
    y = torch.where(live_slots(inputs)[:, :, None], y_TKH.double(), 0.0)
    exact = (w[:, :, None] * y).sum(dim=1)
    magnitude = (w.abs()[:, :, None] * y.abs()).sum(dim=1)
    quantum: float | Tensor = lowest_bit(w) * lowest_bit(y)
    if inputs.problem.quant.quantised:
        # Scales put tokens and columns into different binades: each output has a quantum of its own.
        quantum = (quanta(w)[:, :, None] * quanta(y)).nan_to_num(nan=torch.inf, posinf=torch.inf)
        quantum = quantum.amin(dim=1) if quantum.shape[1] else torch.full_like(exact, torch.inf)
    if inputs.problem.router.zero_experts:
        x, zero = inputs.hidden_states.double(), identity_weights(inputs)[:, None]
        exact, magnitude, quantum = exact + zero * x, magnitude + zero.abs() * x.abs(), 0.0
    return exact, magnitude, quantum


def combine(inputs: Inputs, y_TKH: Tensor, fmt: Format, claims: Claims, shared: tuple[Tensor, Tensor] | None = None) -> Value:
    """COMBINE, isolated: the candidate's own y (T, K, H) in, out (T, H), stored in `fmt`.

    `shared` is the shared expert's output and its allowed error, where the problem has one.
    """
    p = inputs.problem
    exact, magnitude, quantum = routed_sum(inputs, y_TKH)
    exact, magnitude = exact * p.scale_on_sum, magnitude * abs(p.scale_on_sum)
    error = combine_error(magnitude, p.slots + 1, quantum if p.scale_on_sum == 1.0 else 0.0, fmt, claims)
    if shared is not None:
        value, shared_error = shared
        exact, error = exact + value, error + shared_error + 2 * U32 * (value.abs() + exact.abs())
    return stored(exact, error, fmt)
