"""ACT: the whole activation vocabulary in float32, one rounding. Skips dead slots and rows beyond an expert's count."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.elementary import gelu, gelu_tanh, sigmoid, tanh
from moeproof.optimized.slots import Slots, local_expert
from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check


@triton.jit
def _at_most(x, limit):
    """min(x, limit) that lets NaN through."""
    return tl.where(x > limit, limit, x)


@triton.jit
def _within(x, limit):
    return tl.where(x < -limit, -limit, _at_most(x, limit))


@triton.jit
def ungated(g, NAME: tl.constexpr):
    """The activation of one float32 value: the `_no_mul` names, and the gate's part of silu, gelu and gelu_tanh."""
    if NAME == "silu_no_mul" or NAME == "silu":
        h = g * sigmoid(g)
    elif NAME == "gelu_no_mul" or NAME == "gelu":
        h = gelu(g)
    elif NAME == "gelu_tanh_no_mul" or NAME == "gelu_tanh":
        h = gelu_tanh(g)
    else:
        tl.static_assert(NAME == "relu_no_mul" or NAME == "relu2_no_mul")
        h = tl.where(g < 0, 0.0, g)
        if NAME == "relu2_no_mul":
            h = h * h
    return h


@triton.jit
def gated(g, u, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr):
    """The activation of a gate and an up value, both float32."""
    if NAME == "swigluoai" or NAME == "swigluoai_uninterleave":
        g = _at_most(g, LIMIT)
        h = g * sigmoid(ALPHA * g) * (_within(u, LIMIT) + BETA)
    elif NAME == "swiglustep":
        h = _at_most(g * sigmoid(g), LIMIT) * _within(u, LIMIT)
    elif NAME == "situ":
        if LINEAR_BETA > 0:
            u = LINEAR_BETA * tanh(u / LINEAR_BETA)
        h = BETA * tanh(g / BETA) * sigmoid(g) * u
    else:
        if NAME == "silu" and LIMIT > 0:
            # The gate is clamped from above only.
            g = _at_most(g, LIMIT)
            u = _within(u, LIMIT)
        h = ungated(g, NAME) * u
    return h


@triton.jit
def _activate(
    x_RN, h_RI, stride_xr, stride_xn, stride_hr, stride_hi, num_rows, num_columns, counts, rows_per_expert,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < num_rows
    if ids is not None:
        live = local_expert(row, live, ids, expert_map, stride_t, stride_k, num_experts, num_local, K) >= 0
    if counts is not None:
        live = live & (row % rows_per_expert < tl.load(counts + row // rows_per_expert, mask=live, other=0))
    i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = live[:, None] & (i < num_columns)[None, :]
    row = row.to(tl.int64)[:, None]
    i = i.to(tl.int64)[None, :]
    x = x_RN + row * stride_xr
    g = tl.load(x + (2 * i if INTERLEAVED else i) * stride_xn, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(x + (2 * i + 1 if INTERLEAVED else i + num_columns) * stride_xn, mask=mask, other=0.0).to(tl.float32)
        h = gated(g, u, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA)
    else:
        h = ungated(g, NAME)
    tl.store(h_RI + row * stride_hr + i * stride_hi, h.to(h_RI.dtype.element_ty), mask=mask)


def rows_of(x_RN: torch.Tensor, h_RI: torch.Tensor, act: Activation) -> tuple[int, int]:
    """(R, I) of pre-activations x (R, N) and their results h (R, I), which are refused where they do not go together."""
    check(x_RN.dim() == 2 and h_RI.dim() == 2, f"activation takes rows: (R, N), not {tuple(x_RN.shape)}")
    R, I = h_RI.shape  # noqa: E741  (the project's letter)
    check(
        x_RN.shape == (R, act.width_in(I)),
        f"activation '{act}' of {I} columns needs input {(R, act.width_in(I))}, not {tuple(x_RN.shape)}",
    )
    return R, I


def activate(
    x_RN: torch.Tensor,
    h_RI: torch.Tensor,
    act: Activation,
    slots: Slots | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """h (R, I) = act(x (R, N)), rounded once to h's dtype. Any strides; x and h must not overlap.

    With `slots`, row = slot and only live slots are computed. With `counts` (e,), rows are e equal regions and only the
    first counts[e] of each are computed. Other rows are neither read nor written.
    """
    R, I = rows_of(x_RN, h_RI, act)  # noqa: E741  (the project's letter)
    if not h_RI.numel():
        return
    tile = 65536 if interpreted() else 2048
    block_i = min(triton.next_power_of_2(I), 1024)
    block_r = min(tile // block_i, triton.next_power_of_2(R))
    routing = slots.arguments if slots is not None else (None, None, 0, 0, 0, 0, 1)
    _activate[(triton.cdiv(R, block_r), triton.cdiv(I, block_i))](
        x_RN, h_RI, *x_RN.stride(), *h_RI.stride(), R, I, counts, R // counts.numel() if counts is not None else 1, *routing,
        NAME=act.name, GATED=act.gated, INTERLEAVED=bool(act.interleaved),
        ALPHA=act.alpha or 0.0, BETA=act.beta or 0.0, LIMIT=act.limit or 0.0, LINEAR_BETA=act.linear_beta or 0.0,
        BLOCK_R=block_r, BLOCK_I=block_i, num_warps=4,
    )  # fmt: skip
