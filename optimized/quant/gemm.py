"""GEMM1 and GEMM2 on codes: decode in registers, multiply, scale in float32, add the bias, round once. Both layouts.

Standard: rows are gathered by sorted slot and the result is written to row = slot. Batched: one region per expert, rows
beyond the expert's count are neither read nor written. A step of the loop never crosses a scale group.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeproof.optimized.align import Alignment
from moeproof.optimized.grouped_gemm import _swizzle
from moeproof.optimized.quant.codes import decode, low_high
from moeproof.optimized.quant.multiply import DTYPE, multiplier, scaling
from moeproof.optimized.quant.quantise import as_bytes
from moeproof.optimized.quant.tiles import quant_tile
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.schemes import Quantiser

Tensor = torch.Tensor
PROMOTED = 128
"""Terms after which sums of fp8 products move from the tensor core's 13 fraction bits to float32 (Hopper): a claim."""


@triton.jit
def _load_codes(at, live, first, K, stride_k, PACKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """(rows, BLOCK_K) elements from column `first` on, as stored; two-to-a-byte codes unpacked. 0 outside."""
    if PACKED:
        byte = first // 2 + tl.arange(0, BLOCK_K // 2)
        mask = live[:, None] & (byte < K // 2)[None, :]
        tile = low_high(tl.load(at[:, None] + byte.to(tl.int64)[None, :] * stride_k, mask=mask, other=0))
    else:
        k = first + tl.arange(0, BLOCK_K)
        mask = live[:, None] & (k < K)[None, :]
        tile = tl.load(at[:, None] + k.to(tl.int64)[None, :] * stride_k, mask=mask, other=0.0)
    return tile


@triton.jit
def _load_scales(at, live, row, group, stride_row, stride_group, FMT: tl.constexpr, ROWS: tl.constexpr):
    """float32 (rows,): the scale of each row in one group of columns."""
    at += group * stride_group
    if ROWS > 0:
        at += (row // ROWS).to(tl.int64) * stride_row
        scale = tl.load(at, mask=live, other=0.0)
    else:
        scale = tl.load(at + tl.zeros_like(row), mask=live, other=0.0)
    if FMT.width == 8:
        scale = decode(scale, FMT)
    return scale.to(tl.float32)


@triton.jit
def _operand(
    codes, scale_at, zp_at, live, row, first, K, stride_row, stride_group, stride_zp,
    FMT: tl.constexpr, SCALE: tl.constexpr, S: tl.constexpr, OPERAND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(rows, BLOCK_K) of the multiplier's format: codes as they are, or their values, less zero points, times e4m3 scales."""
    if FMT is None or OPERAND is None:
        tile = codes
    else:
        value = decode(codes, FMT)
        if zp_at is not None:
            # Two rows share a byte, the low nibble is the even row's. A step lies inside one group.
            zp = tl.load(zp_at + (row // 2).to(tl.int64) * stride_row + first // S.columns * stride_zp, mask=live, other=0)
            value -= ((zp >> (row % 2 * 4).to(tl.uint8)) & 15).to(tl.float32)[:, None]
        if S.where == "value":
            COUNT: tl.constexpr = BLOCK_K // S.columns
            group = first // S.columns + tl.arange(0, COUNT)
            at = scale_at + row.to(tl.int64)[:, None] * stride_row + group[None, :] * stride_group
            scale = decode(tl.load(at, mask=live[:, None] & (group * S.columns < K)[None, :], other=0), SCALE)
            value = tl.reshape(value, [row.shape[0], COUNT, S.columns]) * scale[:, :, None]
            value = tl.reshape(value, [row.shape[0], BLOCK_K])
        tile = value.to(OPERAND)
    return tile


@triton.jit
def _scaled_gemm(
    x, x_scale, x_global, w, w_scale, w_zp, w_global, bias, out,
    sorted_slots, block_expert, num_padded, counts, num_slots, slots_per_row, num_m, C, N, K,
    stride_xe, stride_xr, stride_xk, stride_sxe, stride_sxr, stride_sxg, stride_gx,
    stride_we, stride_wn, stride_wk, stride_swe, stride_swn, stride_swg, stride_ze, stride_zn, stride_zg, stride_gw,
    stride_be, stride_bn, stride_oe, stride_or, stride_on,
    X: tl.constexpr, W: tl.constexpr, X_FMT: tl.constexpr, W_FMT: tl.constexpr,
    X_SCALE: tl.constexpr, W_SCALE: tl.constexpr, ENCODED: tl.constexpr, OPERAND: tl.constexpr, PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    num_n = tl.cdiv(N, BLOCK_N)
    if counts is None:
        num_m = tl.load(num_padded) // BLOCK_M
        if tl.program_id(0) >= num_m * num_n:
            return
        block, column = _swizzle(tl.program_id(0), num_m, num_n, GROUP_M)
        expert = tl.load(block_expert + block).to(tl.int64)
        if expert < 0:
            return
        out_row = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
        live = out_row < num_slots
        row = out_row // slots_per_row
    else:
        expert = tl.program_id(0) // (num_m * num_n)
        block, column = _swizzle(tl.program_id(0) % (num_m * num_n), num_m, num_n, GROUP_M)
        count = tl.minimum(tl.load(counts + expert), C)
        if block * BLOCK_M >= count:
            return
        expert = expert.to(tl.int64)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        live = row < count
        out_row = row
        x += expert * stride_xe
        out += expert * stride_oe
        if X_FMT is not None:
            x_scale += expert * stride_sxe
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    x_m = x + row.to(tl.int64) * stride_xr
    w_n = w + expert * stride_we + n.to(tl.int64) * stride_wn
    w_scale += expert * stride_swe
    if w_zp is not None:
        w_zp += expert * stride_ze

    INTEGER: tl.constexpr = OPERAND is None and W_FMT.integer
    STEPS: tl.constexpr = X.where == "step" or W.where == "step"
    X_PACKED: tl.constexpr = X_FMT is not None and X_FMT.per_byte == 2
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGER else tl.float32)
    for first in range(0, K, BLOCK_K):
        x_tile = _load_codes(x_m, live, first, K, stride_xk, X_PACKED, BLOCK_K)
        w_tile = _load_codes(w_n, inside, first, K, stride_wk, W_FMT.per_byte == 2, BLOCK_K)
        x_tile = _operand(
            x_tile, x_scale, None, live, row, first, K, stride_sxr, stride_sxg, 0, X_FMT, X_SCALE, X, OPERAND, BLOCK_K
        )
        w_tile = _operand(
            w_tile, w_scale, w_zp, inside, n, first, K, stride_swn if w_zp is None else stride_zn, stride_swg, stride_zg,
            W_FMT, W_SCALE, W, OPERAND, BLOCK_K,
        )  # fmt: skip
        w_tile = tl.trans(w_tile)
        if STEPS:
            # From zero: the partial sum of one scale group.
            part = tl.dot(x_tile, w_tile, input_precision="ieee")
            if X.where == "step":
                at = first // X.columns
                part *= _load_scales(x_scale, live, row, at, stride_sxr, stride_sxg, X_SCALE, X.rows)[:, None]
            if W.where == "step":
                at = first // W.columns
                part *= _load_scales(w_scale, inside, n, at, stride_swn, stride_swg, W_SCALE, W.rows)[None, :]
            acc += part
        elif INTEGER:
            acc = tl.dot(x_tile, w_tile, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x_tile, w_tile, acc, input_precision="ieee", max_num_imprecise_acc=PROMOTE)

    acc = acc.to(tl.float32)
    if X.where == "sum":
        acc *= _load_scales(x_scale, live, row, 0, stride_sxr, stride_sxg, X_SCALE, X.rows)[:, None]
    if W.where == "sum":
        acc *= _load_scales(w_scale, inside, n, 0, stride_swn, stride_swg, W_SCALE, W.rows)[None, :]
    if w_global is not None:
        both = tl.load(w_global + expert * stride_gw)
        if x_global is not None:
            both *= tl.load(x_global + expert * stride_gx)
        if ENCODED:
            acc = tl.div_rn(acc, both + tl.zeros_like(acc))
        else:
            acc *= both
    if bias is not None:
        b = tl.load(bias + expert * stride_be + n.to(tl.int64) * stride_bn, mask=inside, other=0.0)
        acc += b.to(tl.float32)[None, :]
    at = out + out_row.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_on
    tl.store(at, acc.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@dataclass(frozen=True)
class Rows:
    """Activations of a product: plain (R, A), or codes with their scales; (e, C, A) in the batched layout."""

    values: Tensor
    quantiser: Quantiser | None = None
    scale: Tensor | None = None
    level: Tensor | None = None
    """Global scale of a two-level row: float32 (1, 1), or (e, 1, 1) by local expert."""


@dataclass(frozen=True)
class Weights:
    """Codes (e, N, A) with scales, zero points, global scales (e, 1, 1) as the contract's Inputs describe them."""

    codes: Tensor
    quantiser: Quantiser
    scale: Tensor
    zp: Tensor | None = None
    level: Tensor | None = None
    bias: Tensor | None = None
    """(e, N)."""


def _strides(t: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides of the last `dims` dims, 0 for those that t lacks."""
    given = () if t is None else t.stride()[-dims:]
    return (0,) * (dims - len(given)) + tuple(given)


def _launch(
    x: Rows, w: Weights, out: Tensor, K: int, dtype: Format, routing: tuple[object, ...], grid_m: int, block_m: int,
    num_m: int, slots_per_row: int, C: int,
) -> None:  # fmt: skip
    N = out.size(-1)
    kind = multiplier(x.quantiser, w.quantiser)
    check(
        not kind.max_length or kind.max_length >= K,
        f"products of {K} {kind.operand} codes may leave int32; at most {kind.max_length}",
    )
    check(out.dtype in _FLOATS and (x.quantiser is not None or x.values.dtype == dtype.dtype), f"rows are {x.values.dtype}")
    xs, ws = scaling(x.quantiser), scaling(w.quantiser)
    native = kind.operand in ("e4m3fn", "int8")
    operand = None if native else _FLOATS[dtype.dtype if kind.operand == DTYPE else FORMATS[kind.operand].dtype]
    tile = quant_tile(block_m, N, K, kind.operand, dtype, min((s for s in (xs.step, ws.step) if s), default=0))
    raw = (lambda t: t) if native else as_bytes
    codes_x = x.values if x.quantiser is None else raw(x.values)
    scale_x = None if x.scale is None else as_bytes(x.scale)
    _scaled_gemm[(grid_m * triton.cdiv(N, tile.block_n),)](
        codes_x, scale_x, x.level, raw(w.codes), as_bytes(w.scale), w.zp, w.level, w.bias, out,
        *routing, slots_per_row, num_m, C, N, K,
        *_strides(codes_x, 3), *_strides(scale_x, 3), _strides(x.level, 3)[0],
        *w.codes.stride(), *w.scale.stride(), *_strides(w.zp, 3), _strides(w.level, 3)[0],
        *_strides(w.bias, 2), *_strides(out, 3),
        X=xs, W=ws, X_FMT=None if x.quantiser is None else x.quantiser.format, W_FMT=w.quantiser.format,
        X_SCALE=None if x.quantiser is None else x.quantiser.scale_format(dtype), W_SCALE=w.quantiser.scale_format(dtype),
        ENCODED=w.quantiser.rule == "two_level_encode", OPERAND=operand,
        PROMOTE=min(PROMOTED, tile.block_k) if kind.operand == "e4m3fn" else None,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


_FLOATS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def grouped_scaled_gemm(x: Rows, w: Weights, out_SN: Tensor, alignment: Alignment, slots_per_row: int, dtype: Format) -> None:
    """out[slot] = x[slot // slots_per_row] @ w[expert of slot].T (+ bias), for live slots; other rows are not touched.

    x (R, A) and w (e, N, A) stand for the decoded values; `dtype` is the problem's. GEMM1 has slots_per_row = K, GEMM2 1.
    """
    S, K = out_SN.size(0), w.codes.size(2) * w.quantiser.format.per_byte
    if S == 0:
        return
    routing = (alignment.sorted_slots, alignment.block_expert, alignment.num_padded, None, S)
    _launch(x, w, out_SN, K, dtype, routing, alignment.num_blocks, alignment.block_m, 0, slots_per_row, 0)


def batched_scaled_gemm(
    x: Rows, w: Weights, out_eCN: Tensor, counts: Tensor, dtype: Format, mean_rows: int | None = None
) -> None:
    """out[e, c] = x[e, c] @ w[e].T (+ bias) for c < counts[e]; other rows are neither read nor written."""
    (e, C, _), K = out_eCN.shape, w.codes.size(2) * w.quantiser.format.per_byte
    check(
        counts.shape == (e,) and counts.dtype == torch.int32 and counts.is_contiguous(),
        f"expert_num_tokens is {counts.dtype} {tuple(counts.shape)}, must be contiguous int32 ({e},)",
    )
    if C == 0:
        return
    block_m = rows_per_block(C if mean_rows is None else mean_rows, 1)
    num_m = triton.cdiv(C, block_m)
    _launch(x, w, out_eCN, K, dtype, (None, None, None, counts, 0), e * num_m, block_m, num_m, 1, C)
