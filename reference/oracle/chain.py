"""The whole layer in float64 with a propagated bound: for candidates that show only some of their tensors.

Each intermediate may or may not have been rounded to the problem's dtype (fused kernels keep float32), so every rounding
enters as a variance ulp^2 / 12, and every deterministic error A of a stage as a standard deviation A / 7. Variances pass
through a GEMM by its squared weights and through the activation by its own finite differences. The final allowance is
7 standard deviations and half an ulp of the output (docs/tolerances.md). What is made of a value that may not fit the dtype
is NaN, which is not compared: overflow.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.quant_checks import check_inputs
from moeproof.reference.contract.schemes import Format, Quantiser
from moeproof.reference.oracle import activations
from moeproof.reference.oracle.bounds import U32, accumulator, combine_error
from moeproof.reference.oracle.combine import routed_sum, slot_weights
from moeproof.reference.oracle.experts import by_expert, gemm1_exact, gemm2_exact, input_rows, live_slots, local_ids
from moeproof.reference.oracle.overflow import undefined
from moeproof.reference.oracle.products import Operand, decoded, grouped, plain
from moeproof.reference.oracle.quant_stages import quant1, slot_scale, weight
from moeproof.reference.oracle.requantise import requantised
from moeproof.reference.oracle.rounding import ulp
from moeproof.reference.oracle.value import Trace, stored

Tensor = torch.Tensor
SIGMAS = 7.0


@dataclass(frozen=True)
class Spread:
    """A float64 value and the variance of what a correct implementation may have in its place."""

    value: Tensor
    variance: Tensor

    @property
    def allowed(self) -> Tensor:
        # Where a sum may have left float32's range its variance is infinite, and infinity times a weight of 0 is not 0 either.
        return (SIGMAS * self.variance.sqrt()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def known(x: Tensor) -> Spread:
    """An input: no doubt about its value."""
    return Spread(x.double(), torch.zeros_like(x, dtype=torch.float64))


def _spread(exact: Tensor, error: Tensor, fmt: Format) -> Spread:
    """A stage's own contribution: its arithmetic error and one rounding to `fmt`. None where both are proved exact."""
    variance = (error / SIGMAS) ** 2 + ulp(exact, fmt) ** 2 / 12
    representable = (error == 0) & (torch.remainder(exact, ulp(exact, fmt)) == 0)
    return Spread(exact, torch.where(representable, 0.0, variance))


def _as_read(x: Spread, fmt: Format, q: Quantiser | None = None, given: Tensor | None = None) -> Spread:
    """x as the next stage reads it, QUANT2 by `q` if it is one: NaN where a kernel that stores x may hold an infinity."""
    lost = undefined(x.value, x.allowed, fmt, q, given) | x.value.isnan()
    return Spread(torch.where(lost, torch.nan, x.value), torch.where(lost, 0.0, x.variance))


def _through_activation(x: Spread, problem: Problem, claims: Claims) -> Spread:
    act = problem.act
    value = activations.exact(x.value, act)
    own = _spread(value, activations.error(x.value, value, act, problem.fmt, claims), problem.fmt)
    sigma = x.variance.sqrt()
    if act.gated:
        # Gate and up vary independently: step each by its own sigma, and take the larger side (clamps have kinks).
        gate, up = (_of_half(sigma, half, problem) for half in (0, 1))
        moved = _larger_step(x.value, gate, value, problem) ** 2 + _larger_step(x.value, up, value, problem) ** 2
        moved += _both(x.value, SIGMAS * gate, SIGMAS * up, value, problem) ** 2 / SIGMAS**2
    else:
        moved = _larger_step(x.value, sigma, value, problem) ** 2
    return Spread(value, own.variance + moved)


def _of_half(sigma: Tensor, half: int, problem: Problem) -> Tensor:
    """sigma of the gate (0) or of up (1), zero for the other."""
    step = torch.zeros_like(sigma)
    activations.split(step, problem.act)[half].copy_(activations.split(sigma, problem.act)[half])
    return step


def _both(x: Tensor, gate: Tensor, up: Tensor, value: Tensor, problem: Problem) -> Tensor:
    """What both steps move together beyond each alone: all there is where gate and up are 0."""
    alone = activations.exact(x + gate, problem.act) + activations.exact(x + up, problem.act) - value
    return activations.exact(x + gate + up, problem.act) - alone


def _larger_step(x: Tensor, step: Tensor, value: Tensor, problem: Problem) -> Tensor:
    up = (activations.exact(x + step, problem.act) - value).abs()
    down = (activations.exact(x - step, problem.act) - value).abs()
    return torch.maximum(up, down)


def _weighted(variance_TKA: Tensor, w: Callable[[int], Tensor], experts: int, rows: int, local_TK: Tensor) -> Tensor:
    """Variance (T, K, rows) of rows times their expert's weights w(expert): variance times squared weights."""
    T, K = local_TK.shape
    out = torch.zeros(T, K, rows, dtype=torch.float64, device=variance_TKA.device)
    for expert, tokens, slots in by_expert(local_TK, experts):
        out[tokens, slots] = variance_TKA[tokens, slots] @ (w(expert).double() ** 2).T
    return out


def _experts(inputs: Inputs, x: Spread, claims: Claims) -> tuple[Spread, Spread, Spread]:
    """gate_up, h and y (T, K, .) of input rows x (T, H)."""
    p, local = inputs.problem, local_ids(inputs)
    if p.quant.quantised:
        return quantised_experts(inputs, claims, quantised_rows(inputs))
    gate_up = _spread(*gemm1_exact(inputs, x.value, claims), p.fmt)
    if bool(x.variance.any()):
        rows = x.variance[:, None, :].expand(*local.shape, -1)
        own = _weighted(rows, inputs.w1.__getitem__, inputs.w1.size(0), inputs.w1.size(1), local)
        gate_up = Spread(gate_up.value, gate_up.variance + own)
    h = _through_activation(_as_read(gate_up, p.fmt), p, claims)
    read = _as_read(h, p.fmt)
    y = _spread(*gemm2_exact(inputs, read.value, claims), p.fmt)
    own = _weighted(read.variance, inputs.w2.__getitem__, inputs.w2.size(0), inputs.w2.size(1), local)
    return gate_up, h, Spread(y.value, y.variance + own)


def quantised_rows(inputs: Inputs) -> Operand:
    """(T, K, H): what GEMM1 reads where weights are quantised, x itself or the codes of QUANT1."""
    if inputs.problem.quant.a1 is None:
        return plain(input_rows(inputs, inputs.hidden_states), inputs.problem.fmt)
    return decoded(quant1(inputs)).in_slots(inputs.topk_ids.shape[1])


def quantised_experts(inputs: Inputs, claims: Claims, rows: Operand) -> tuple[Spread, Spread, Spread]:
    """gate_up, h and y of the quantised experts. `rows` (T, K, H) are exact; h is not, so its codes may flip: `requantised`."""
    p, scheme, local = inputs.problem, inputs.problem.quant, local_ids(inputs)
    gate_up = _spread(*grouped(inputs, "w1", rows, inputs.b1, claims, p.N), p.fmt)
    h = _through_activation(_as_read(gate_up, p.fmt), p, claims)
    read = _as_read(h, p.fmt, scheme.a2, slot_scale(inputs, inputs.a2_scale))
    if scheme.a2 is None:
        operand, variance = plain(read.value, p.fmt), read.variance
    else:
        operand, variance = requantised(inputs, read.value, read.variance)
    y = _spread(*grouped(inputs, "w2", operand, inputs.b2, claims, p.hidden), p.fmt)
    # Decoded one expert at a time: all of a full-size layer in float64 would not fit beside its codes.
    own = _weighted(variance, lambda expert: weight(inputs, "w2", expert).values, inputs.w2.size(0), p.hidden, local)
    return gate_up, h, Spread(y.value, y.variance + own)


def shared_expert(inputs: Inputs, claims: Claims) -> tuple[Tensor, Tensor] | None:
    """(value, allowed error), float64 (T, H): the shared expert as a layer of one expert that takes every token."""
    p = inputs.problem
    if not p.shared:
        return None
    assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
    T = p.T
    ids = torch.zeros(T, 1, dtype=torch.int64, device=inputs.device)
    alone = Inputs(
        problem=Problem(T=T, H=p.H, I=p.shared, E=1, K=1, dtype=p.dtype, act=p.act),
        hidden_states=inputs.hidden_states,
        topk_ids=ids,
        topk_weights=torch.ones(T, 1, device=inputs.device),
        w1=inputs.shared_w1[None],
        w2=inputs.shared_w2[None],
    )
    y = _experts(alone, known(inputs.hidden_states), claims)[2]
    value, variance = y.value[:, 0], y.variance[:, 0]
    if inputs.shared_gate is not None:
        x, w = inputs.hidden_states.double(), inputs.shared_gate.double()
        logit, S = x @ w, x.abs() @ w.abs()
        gate = torch.sigmoid(logit)[:, None]
        # The gate's own error: its logit may have been stored in the dtype, and its sigmoid too.
        slope = (gate * (1 - gate)) * (S * p.H**0.5 * U32 + ulp(logit, p.fmt) / 2)[:, None] + ulp(gate, p.fmt) / 2
        variance = variance * gate**2 + (value * slope) ** 2 + ulp(value * gate, p.fmt) ** 2 / 12
        value = value * gate
    return value, SIGMAS * variance.sqrt()


def project(x_TA: Tensor, w_BA: Tensor, fmt: Format) -> Spread:
    """A dense projection (T, A) -> (T, B) whose result may have been stored in `fmt`."""
    x, w = x_TA.double(), w_BA.double()
    y = x @ w.T
    error = accumulator(x.shape[1], fmt, Claims()) * (x.abs() @ w.abs().T)
    return _spread(y, error, fmt)


def chain(inputs: Inputs, claims: Claims) -> Trace:
    """gate_up, h, y and out of the whole layer, each with the bound propagated from the inputs."""
    fmt, live = inputs.problem.fmt, live_slots(inputs)
    taps = spreads(inputs, claims)
    return {name: stored(s.value, s.allowed, fmt, None if name == "out" else live) for name, s in taps.items()}


def spreads(inputs: Inputs, claims: Claims) -> dict[str, Spread]:
    """The same four before they are stored: exact values and variances. Refuses scales that the scheme does not have."""
    check_inputs(inputs)
    p = inputs.problem
    x = known(inputs.hidden_states)
    if p.latent:
        assert inputs.latent_down is not None
        x = project(x.value, inputs.latent_down, p.fmt)
    gate_up, h, y = _experts(inputs, x, claims)
    return {"gate_up": gate_up, "h": h, "y": y, "out": finish(inputs, y, claims)}


def finish(inputs: Inputs, y: Spread, claims: Claims) -> Spread:
    """out (T, H) of the experts' y (T, K, .): weigh and sum, scale, leave the latent width, add the shared expert."""
    p = inputs.problem
    y = _as_read(y, p.fmt)
    exact, magnitude, quantum = routed_sum(inputs, y.value)
    own = combine_error(magnitude, p.slots + 1, quantum, p.fmt, claims)
    total = Spread(exact, (_squared_weights(inputs)[:, :, None] * y.variance).sum(dim=1) + (own / SIGMAS) ** 2)
    total = Spread(total.value * p.scale_on_sum, total.variance * p.scale_on_sum**2)
    if p.latent:
        total = _out_of_latent(inputs, total)
    shared = shared_expert(inputs, claims)
    if shared is not None:
        value, allowed = shared
        total = Spread(total.value + value, total.variance + (allowed / SIGMAS) ** 2 + (2 * U32 * value) ** 2)
        if claims.combine == "dtype":
            total = Spread(total.value, total.variance + ulp(total.value, p.fmt) ** 2 / 6)
    return total


def _squared_weights(inputs: Inputs) -> Tensor:
    """float64 (T, K): what each slot's variance is multiplied by in the sum over slots.

    Slots of one token that name one expert hold the same y with the same error: their weights add up before they are
    squared. w_k * (sum of w_j over such slots j) has that sum over the group.
    """
    w, ids = slot_weights(inputs), inputs.topk_ids
    same = ids[:, :, None] == ids[:, None, :]
    return w * torch.where(same, w[:, None, :], 0.0).sum(dim=2)


def _out_of_latent(inputs: Inputs, total: Spread) -> Spread:
    """RMSNorm (where the model has it) and the up-projection."""
    p = inputs.problem
    assert inputs.latent_up is not None
    value, variance = total.value, total.variance + ulp(total.value, p.fmt) ** 2 / 12
    if p.latent_norm:
        assert inputs.latent_norm is not None
        scale = torch.rsqrt((value**2).mean(dim=1, keepdim=True) + 1e-6) * inputs.latent_norm.double()
        value, variance = value * scale, variance * scale**2 + ulp(value * scale, p.fmt) ** 2 / 6
    up = project(value, inputs.latent_up, p.fmt)
    return Spread(up.value, up.variance + variance @ (inputs.latent_up.double() ** 2).T)
