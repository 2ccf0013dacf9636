"""GEMM1 and GEMM2 as loops over experts in float64, in canonical (token, slot) coordinates."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import FORMATS, Format
from moeproof.reference.oracle.bounds import EXACT_TERMS, dot_error
from moeproof.reference.oracle.rounding import lowest_bit, round_to
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor
SAMPLE = 16
"""Rows looked at before the whole of an operand is scanned for its lowest bit."""


def live_slots(inputs: Inputs) -> Tensor:
    """bool (T, K): slots routed to an expert whose weights are here. -1, remote and identity experts are not live."""
    return local_ids(inputs) >= 0


def local_ids(inputs: Inputs) -> Tensor:
    """int64 (T, K): index into w1 and w2, or -1. The map is never indexed by -1."""
    ids = inputs.topk_ids.long()
    routed = (ids >= 0) & (ids < inputs.problem.weight_experts)
    if inputs.expert_map is None:
        return torch.where(routed, ids, -1)
    return torch.where(routed, inputs.expert_map.long()[ids.clamp(0, inputs.problem.weight_experts - 1)], -1)


def input_rows(inputs: Inputs, x_TH: Tensor) -> Tensor:
    """float64 (T, K, H) view or tensor: what the experts see, weighted (and rounded) where the weight is on the input."""
    T, K = inputs.topk_ids.shape
    x = x_TH.double()
    if inputs.problem.weight_on_input:
        weights = torch.where(live_slots(inputs), inputs.topk_weights.double(), 0.0)
        return weighed(x[:, None, :], weights[:, :, None], inputs.problem.fmt)
    return x[:, None, :].expand(T, K, x.shape[1])


def weighed(x: Tensor, w: Tensor, fmt: Format) -> Tensor:
    """x times a float32 weight as the contract has it: a float32 product, then rounded to the dtype. Exact in float64 first."""
    return round_to(round_to(x * w, FORMATS["fp32"]), fmt)


def by_expert(local_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, tokens, slots) for each local expert that has rows."""
    for expert in range(num_experts):
        tokens, slots = torch.nonzero(local_TK == expert, as_tuple=True)
        if tokens.numel():
            yield expert, tokens, slots


def _quantum(x: Tensor, w: Tensor, S: Tensor) -> float:
    """Power of two that divides every product, or 0 where exactness can be ruled out from a few rows."""
    sample = lowest_bit(x[:SAMPLE]) * lowest_bit(w[:SAMPLE])
    if not float(S.min()) <= EXACT_TERMS * sample:
        return 0.0
    return lowest_bit(x) * lowest_bit(w)


def _grouped(
    rows_TKA: Tensor, w_eBA: Tensor, bias_eB: Tensor | None, local_TK: Tensor, problem: Problem, claims: Claims
) -> tuple[Tensor, Tensor]:
    """(exact, error), both float64 (T, K, B): rows times their expert's weights, plus its bias. Zero where not live."""
    T, K = local_TK.shape
    B, A = w_eBA.shape[1:]
    exact = torch.zeros(T, K, B, dtype=torch.float64, device=rows_TKA.device)
    error = torch.zeros_like(exact)
    for expert, tokens, slots in by_expert(local_TK, w_eBA.shape[0]):
        x = rows_TKA[tokens, slots].double()
        w = w_eBA[expert].double()
        y = x @ w.T
        S = x.abs() @ w.abs().T
        quantum = _quantum(x, w, S)
        if bias_eB is not None:
            b = bias_eB[expert].double()
            y, S = y + b, S + b.abs()
            quantum = min(quantum, lowest_bit(b)) if quantum else 0.0
        exact[tokens, slots] = y
        error[tokens, slots] = dot_error(S, y, A + (bias_eB is not None), quantum, problem.fmt, claims)
    return exact, error


def gemm1(inputs: Inputs, x_TH: Tensor, fmt: Format, claims: Claims) -> Value:
    """GEMM1: x (T, H) -> gate_up (T, K, N), stored in `fmt`."""
    exact, error = gemm1_exact(inputs, x_TH, claims)
    return stored(exact, error, fmt, live_slots(inputs))


def gemm2(inputs: Inputs, h_TKI: Tensor, fmt: Format, claims: Claims) -> Value:
    """GEMM2: h (T, K, I) -> y (T, K, H), unweighted and unreduced, stored in `fmt`."""
    exact, error = gemm2_exact(inputs, h_TKI, claims)
    return stored(exact, error, fmt, live_slots(inputs))


def gemm1_exact(inputs: Inputs, x_TH: Tensor, claims: Claims) -> tuple[Tensor, Tensor]:
    return _grouped(input_rows(inputs, x_TH), inputs.w1, inputs.b1, local_ids(inputs), inputs.problem, claims)


def gemm2_exact(inputs: Inputs, h_TKI: Tensor, claims: Claims) -> tuple[Tensor, Tensor]:
    return _grouped(h_TKI, inputs.w2, inputs.b2, local_ids(inputs), inputs.problem, claims)
