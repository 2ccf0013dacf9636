"""QUANT1 and QUANT2: rows, or the activation of rows, to codes and scales in one pass; two where a scale spans the tensor.

A program's tile is (rows, groups, columns of a group). Rows that are not live are neither read nor written, and nothing of
what lies beside the last column enters a scale.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.activation import activate, gated, ungated
from moeproof.optimized.quant.codes import bits_of, encode
from moeproof.optimized.quant.scales import factor, quotient, stored_scale
from moeproof.optimized.slots import Slots, local_expert
from moeproof.optimized.tiles import interpreted
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.quant_checks import check_static_scale
from moeproof.reference.contract.schemes import ALL, Quantiser

Tensor = torch.Tensor
WIDEST = 32768
"""Columns that share a row's scale are held by one program: 64 a thread."""
FUSED = 8192
"""Columns of which a program also computes the activation without spilling; wider rows take a launch of their own for it."""


@triton.jit
def _row_expert(row, R, counts, rows_per_expert, ids, expert_map, stride_t, stride_k, num_experts, num_local, K):
    """(live, local expert) of each row: all live and 0, by slot where ids are given, by region where counts are."""
    live = row < R
    expert = tl.zeros_like(row)
    if ids is not None:
        expert = local_expert(row, live, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
        live = expert >= 0
    if counts is not None:
        expert = row // rows_per_expert
        live = live & (row % rows_per_expert < tl.load(counts + expert, mask=live, other=0))
    return live, expert


@triton.jit
def _values(
    x, h, row, column, mask, C, stride_xr, stride_xc,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
):  # fmt: skip
    """float32 of what is quantised: x, or its activation rounded to x's dtype, which is stored to h where h is given."""
    at = x + row.to(tl.int64) * stride_xr
    column = column.to(tl.int64)
    first = tl.load(at + (2 * column if INTERLEAVED else column) * stride_xc, mask=mask, other=0.0).to(tl.float32)
    if NAME is None:
        value = first
    else:
        if GATED:
            second = tl.load(at + (2 * column + 1 if INTERLEAVED else column + C) * stride_xc, mask=mask, other=0.0)
            value = gated(first, second.to(tl.float32), NAME, ALPHA, BETA, LIMIT, LINEAR_BETA)
        else:
            value = ungated(first, NAME)
        rounded = value.to(x.dtype.element_ty)
        if h is not None:
            tl.store(h + row.to(tl.int64) * C + column, rounded, mask=mask)
        # Padding may not have become something else on the way through the activation.
        value = tl.where(mask, rounded.to(tl.float32), 0.0)
    return value


@triton.jit
def _largest(
    x, h, amax, R, C, stride_xr, stride_xc, counts, rows_per_expert,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """amax = the largest magnitude of live rows, as float32 bits, which order as integers do. Stores the activation to h."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live, _ = _row_expert(row, R, counts, rows_per_expert, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = live[:, None] & (column < C)[None, :]
    value = _values(
        x, h, row[:, None], column[None, :], mask, C, stride_xr, stride_xc,
        NAME, GATED, INTERLEAVED, ALPHA, BETA, LIMIT, LINEAR_BETA,
    )  # fmt: skip
    tl.atomic_max(amax, bits_of(tl.max(tl.max(tl.abs(value), 1), 0)))


@triton.jit
def _quantise(
    x, h, codes, scales, given, amax, R, C, num_groups, stride_xr, stride_xc, stride_given, counts, rows_per_expert,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    NAME: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    Q: tl.constexpr, FMT: tl.constexpr, SCALE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_G: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    live, expert = _row_expert(row, R, counts, rows_per_expert, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    group = tl.program_id(1) * BLOCK_G + tl.arange(0, BLOCK_G)
    column = group[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    mask = live[:, None, None] & (column < C)[None, :, :]
    value = _values(
        x, h, row[:, None, None], column[None, :, :], mask, C, stride_xr, stride_xc,
        NAME, GATED, INTERLEAVED, ALPHA, BETA, LIMIT, LINEAR_BETA,
    )  # fmt: skip

    largest = tl.max(tl.abs(value), 2)
    if amax is not None:
        largest = tl.zeros_like(largest) + tl.load(amax).to(tl.float32, bitcast=True)
    outer = tl.zeros_like(largest)
    if given is not None:
        outer += tl.load(given + expert * stride_given, mask=live, other=1.0)[:, None]
    stored = stored_scale(largest, outer, Q, FMT, SCALE)
    f = factor(stored, largest, outer, Q, FMT, SCALE)
    code = encode(quotient(value, f[:, :, None], Q), FMT)

    start = row.to(tl.int64)[:, None, None] * (C // FMT.per_byte)
    if FMT.per_byte == 2:
        low, high = tl.split(tl.reshape(code, [BLOCK_R, BLOCK_G, WIDTH // 2, 2]))
        at = group[:, None] * (WIDTH // 2) + tl.arange(0, WIDTH // 2)[None, :]
        inside = live[:, None, None] & (at < C // 2)[None, :, :]
        tl.store(codes + start + at[None, :, :], (low | (high << 4)).to(codes.dtype.element_ty), mask=inside)
    else:
        tl.store(codes + start + column[None, :, :], code.to(codes.dtype.element_ty), mask=mask)
    if scales is not None:
        if amax is not None:
            written = (row == 0)[:, None] & (group == 0)[None, :]
        else:
            written = live[:, None] & (group < num_groups)[None, :]
        at = scales + row.to(tl.int64)[:, None] * num_groups + group[None, :]
        tl.store(at, stored.to(scales.dtype.element_ty), mask=written)


def as_bytes(t: Tensor) -> Tensor:
    """8-bit floats as uint8: kernels take codes apart themselves, and Triton refuses e4m3 on older GPUs."""
    return t.view(torch.uint8) if t.dtype.is_floating_point and t.dtype.itemsize == 1 else t


def code_buffers(q: Quantiser, dtype: Format, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Uninitialised codes and scales of a (rows, columns) tensor."""
    codes = torch.empty(q.code_shape(rows, columns), dtype=q.format.dtype, device=device)
    return codes, torch.empty(q.scale_shape(rows, columns), dtype=q.scale_format(dtype).dtype, device=device)


def quantise(
    x_RC: Tensor,
    q: Quantiser,
    dtype: Format,
    given: Tensor | None = None,
    *,
    act: Activation | None = None,
    slots: Slots | None = None,
    counts: Tensor | None = None,
    h_RI: Tensor | None = None,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(codes, scales) of x (R, C), or of its activation: shapes and dtypes are q's for the problem's `dtype`.

    `given` is a static scale (1, 1), returned as it is, or the global scale of a two-level q: (1, 1), or (e, 1, 1) by local
    expert. With `slots` row = slot and only live slots count and are written; with `counts` (e,) the first counts[e] rows of
    e equal regions. `h_RI`, contiguous in x's dtype, receives the activation; it is what was quantised. `into` are contiguous
    buffers for the result. Any strides of x.
    """
    R, C = x_RC.size(0), x_RC.size(1) if act is None else x_RC.size(1) // act.width_in(1)
    experts = _check(x_RC, q, given, act, h_RI, (R, C))
    codes, scales = into or code_buffers(q, dtype, R, C, x_RC.device)
    whole = q.group == (ALL, ALL)
    routing = (counts, R // counts.numel() if counts is not None else 1)
    routing += slots.arguments if slots is not None else (None, None, 0, 0, 0, 0, 1)

    amax = torch.zeros(1, dtype=torch.int32, device=x_RC.device) if whole and not q.static else None
    wide = q.group == (1, ALL) and C > FUSED
    if act is not None and h_RI is None and (amax is not None or wide):
        h_RI = torch.empty(R, C, dtype=x_RC.dtype, device=x_RC.device)
    if amax is not None and R:
        block_r, block_c = _rows_of_tile(R, min(triton.next_power_of_2(C), 1024)), min(triton.next_power_of_2(C), 1024)
        _largest[(triton.cdiv(R, block_r), triton.cdiv(C, block_c))](
            x_RC, h_RI, amax, R, C, *x_RC.stride(), *routing, **_activation_options(act), BLOCK_R=block_r, BLOCK_C=block_c
        )
    elif act is not None and wide:
        assert h_RI is not None
        activate(x_RC, h_RI, act, slots=slots, counts=counts)
    source, kept = x_RC, h_RI
    if act is not None and (amax is not None or wide):
        assert h_RI is not None
        source, kept, act = h_RI, None, None
    # The scale of a whole tensor is known by now: then groups are only a way to cut the columns.
    width = q.group[1] or triton.next_power_of_2(C)
    width = min(width, 1024) if whole else width
    num_groups = triton.cdiv(C, width)
    block_g = min(max(1, 1024 // width), triton.next_power_of_2(num_groups))
    block_r = _rows_of_tile(R, block_g * width)
    # A scale that comes from the whole tensor is written even where there are no rows.
    grid = (triton.cdiv(R, block_r) or int(amax is not None), triton.cdiv(num_groups, block_g))
    verbatim = whole and q.static
    if grid[0]:
        _quantise[grid](
            source, kept, as_bytes(codes), None if verbatim else as_bytes(scales), given, amax, R, C, num_groups,
            *source.stride(), given.stride(0) if experts else 0, *routing, **_activation_options(act),
            Q=q, FMT=q.format, SCALE=q.scale_format(dtype), BLOCK_R=block_r, BLOCK_G=block_g, WIDTH=width,
            num_warps=4 if width <= 4096 else 8 if width <= 8192 else 16,
        )  # fmt: skip
    return codes, given if verbatim else scales  # type: ignore[return-value]


def _check(
    x_RC: Tensor, q: Quantiser, given: Tensor | None, act: Activation | None, h_RI: Tensor | None, shape: tuple[int, int]
) -> int:
    """The number of experts that `given` has a scale for each of; 0 = one for all."""
    C = shape[1]
    check(x_RC.dim() == 2, f"what is quantised has {x_RC.dim()} dims, must have 2: (rows, columns)")
    check(
        act is None or x_RC.size(1) == act.width_in(C),
        f"activation '{act}' takes pairs of columns; its input has {x_RC.size(1)}",
    )
    q.check_columns("what is quantised", C)
    experts = 0 if given is None or given.dim() == 2 else given.size(0)
    check_static_scale("the activation scale", q, given, experts, x_RC.device)
    check(q.group != (1, ALL) or C <= WIDEST, f"{C} columns share a scale; at most {WIDEST} are supported")
    check(h_RI is None or (h_RI.is_contiguous() and tuple(h_RI.shape) == shape), f"h must be contiguous {shape}")
    return experts


def _activation_options(act: Activation | None) -> dict[str, object]:
    """The constants of `_values`; without an activation it takes x as it is."""
    numbers = {name.upper(): getattr(act, name, None) or 0.0 for name in ("alpha", "beta", "limit", "linear_beta")}
    if act is None:
        return {"NAME": None, "GATED": False, "INTERLEAVED": False, **numbers}
    return {"NAME": act.name, "GATED": act.gated, "INTERLEAVED": bool(act.interleaved), **numbers}


def _rows_of_tile(rows: int, columns: int) -> int:
    """Rows of a program: tiles of about 2048 elements, or as large as the interpreter likes."""
    elements = 65536 if interpreted() else 2048
    return min(max(elements // columns, 1), triton.next_power_of_2(max(rows, 1)))
