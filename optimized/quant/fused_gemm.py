"""GEMM1 with activation and requantisation, GEMM2 with the router weight, on e4m3 codes of the schemes fp8_token and fp8_block.

As in optimized/fused_gemm.py rows lie in sorted order between the products, and a gated GEMM1 computes a gate column and its
up column side by side. What is added here are scales. Those of a token and a channel multiply the finished sum. Those of
blocks multiply partial sums of 128 terms: they are read a step ahead, as scalars wherever a tile lies inside one block of
weights, so that the loop has one fma an element and no load to wait for. A tile of whole groups quantises its own result.

Three ways to sum 128-term partial sums, all named in a tile:
promoted (default): the tensor core starts each partial sum from zero, and float32 registers take it up;
`fast`: the tensor core keeps the sum. With blocks its register is rescaled by the quotient of two neighbouring scales, which
saves the second set of registers. This is the weaker accumulator that a candidate has to claim (fp8_unpromoted);
`swap`: weights are the left operand. Hopper's products have 64 rows at least, which few tokens would leave empty.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moeproof.optimized.align import Alignment
from moeproof.optimized.fused_gemm import _activation, _weights_descriptor, describable
from moeproof.optimized.grouped_gemm import _swizzle
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.quant.gemm import PROMOTED
from moeproof.optimized.quant.rows import e4m3_codes, scale_of
from moeproof.optimized.tiles import Tile, processors
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check

Tensor = torch.Tensor
GROUP = tl.constexpr(128)
"""Columns that share a scale of x, h and (with as many rows) of the weights in scheme fp8_block."""


@triton.jit
def _column_scales(each, first, second, n, inside, at, WS: tl.constexpr):
    """float32 (BLOCK_N,): the weights' scale of every column in the group at offset `at`. See `_where_scales_lie`."""
    if WS == "each":
        s = tl.load(each + at, mask=inside, other=1.0)
    elif WS == "one":
        s = tl.load(first + at) + tl.zeros([n.shape[0]], tl.float32)
    else:
        s = tl.where(n % 2 == 0, tl.load(first + at), tl.load(second + at))
    return s


@triton.jit
def _product(
    a_m, live, stride_ak, a_rows, w, w_n, n, inside, stride_wk, expert, block, column, K,
    xs_m, stride_xg, ws_n, ws_first, ws_second, stride_wg,
    PAIRED: tl.constexpr, TMA: tl.constexpr, BLOCKED: tl.constexpr, WS: tl.constexpr, FAST: tl.constexpr, SWAP: tl.constexpr,
    PROMOTE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N): products of codes; with blocks their scales are in it, with rows and channels not yet."""
    k = tl.arange(0, BLOCK_K)
    a = a_m[:, None] + k.to(tl.int64)[None, :] * stride_ak
    w_at = w_n[:, None] + k.to(tl.int64)[None, :] * stride_wk if not TMA else 0
    step_a = tl.full([], BLOCK_K, tl.int64) * stride_ak
    step_w = tl.full([], BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros([BLOCK_N, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_N], tl.float32)
    if BLOCKED:
        xs = tl.load(xs_m, mask=live, other=1.0)
        ws = _column_scales(ws_n, ws_first, ws_second, n, inside, 0, WS)
    for first in range(0, K, BLOCK_K):
        if a_rows is not None:
            a_tile = a_rows.load([block * BLOCK_M, first])
        else:
            a_mask = live[:, None] if EVEN_K else live[:, None] & (k < K - first)[None, :]
            a_tile = tl.load(a, mask=a_mask, other=0.0)
            a += step_a
        if TMA:
            if PAIRED:
                w_tile = w.load([expert, column * (BLOCK_N // 2), 0, first])
            else:
                w_tile = w.load([expert, column * BLOCK_N, first])
            w_tile = tl.reshape(w_tile, (BLOCK_N, BLOCK_K))
        else:
            if EVEN_N and EVEN_K:
                w_tile = tl.load(w_at)
            elif EVEN_K:
                w_tile = tl.load(w_at, mask=inside[:, None], other=0.0)
            else:
                w_tile = tl.load(w_at, mask=inside[:, None] & (k < K - first)[None, :], other=0.0)
            w_at += step_w
        if not BLOCKED:
            if FAST or BLOCK_K > GROUP:
                if SWAP:
                    acc = tl.dot(w_tile, a_tile.T, acc, max_num_imprecise_acc=PROMOTE)
                else:
                    acc = tl.dot(a_tile, w_tile.T, acc, max_num_imprecise_acc=PROMOTE)
            elif SWAP:
                acc += tl.dot(w_tile, a_tile.T)
            else:
                acc += tl.dot(a_tile, w_tile.T)
        else:
            # The last step reads its own group again: what it would read ahead does not exist.
            ahead = tl.minimum(first + BLOCK_K, K - 1) // GROUP
            xs_next = tl.load(xs_m + ahead * stride_xg, mask=live, other=1.0)
            ws_next = _column_scales(ws_n, ws_first, ws_second, n, inside, ahead * stride_wg, WS)
            if FAST:
                if SWAP:
                    acc = tl.dot(w_tile, a_tile.T, acc, max_num_imprecise_acc=PROMOTE)
                    acc *= (ws / ws_next)[:, None] * (xs / xs_next)[None, :]
                else:
                    acc = tl.dot(a_tile, w_tile.T, acc, max_num_imprecise_acc=PROMOTE)
                    acc *= (xs / xs_next)[:, None] * (ws / ws_next)[None, :]
            elif SWAP:
                acc += tl.dot(w_tile, a_tile.T) * (ws[:, None] * xs[None, :])
            else:
                acc += tl.dot(a_tile, w_tile.T) * (xs[:, None] * ws[None, :])
            xs, ws = xs_next, ws_next
    if BLOCKED and FAST:
        acc *= ws[:, None] * xs[None, :] if SWAP else xs[:, None] * ws[None, :]
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def _tile(
    tile, num_m, num_n, a, a_rows, a_scale, w, w_scale, bias_eN, out, out_rows, out_scale, weights, sorted_slots, block_expert,
    num_slots, slots_per_row, N, K,
    stride_ar, stride_ak, stride_xr, stride_xg, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    DTYPE: tl.constexpr, BLOCKED: tl.constexpr, WS: tl.constexpr, FAST: tl.constexpr, SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M,
    TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = NAME != ""
    PAIRED: tl.constexpr = GATED and PACKED
    block, column = _swizzle(tile, num_m, num_n, GROUP_M)
    expert = tl.load(block_expert + block)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(sorted_slots + position)
    live = slot < num_slots
    row = slot // slots_per_row if FIRST else position
    a_m = a + row.to(tl.int64) * stride_ar
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    weight_row = n // 2 + n % 2 * (N // 2) if PAIRED else n
    # Rows of padding exist between the products, and their scales with them.
    scaled = live if FIRST else position >= 0
    xs_m = a_scale + row.to(tl.int64) * stride_xr
    own_scale = w_scale + expert.to(tl.int64) * stride_se
    ws_n = own_scale + (weight_row // GROUP if BLOCKED else weight_row).to(tl.int64) * stride_sn
    # Where a tile lies inside one block of weight rows (WS): scalars.
    first_row = column * (BLOCK_N // 2) if PAIRED else column * BLOCK_N
    ws_first = own_scale + (first_row // GROUP).to(tl.int64) * stride_sn
    ws_second = own_scale + ((N // 2 + first_row) // GROUP).to(tl.int64) * stride_sn
    w_n = 0 if TMA else w + expert.to(tl.int64) * stride_we + weight_row.to(tl.int64) * stride_wn
    acc = _product(
        a_m, live, stride_ak, a_rows, w, w_n, n, inside, stride_wk, expert, block, column, K,
        xs_m, stride_xg, ws_n, ws_first, ws_second, stride_sg, PAIRED, TMA, BLOCKED, WS, FAST, SWAP, PROMOTE,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K,
    )  # fmt: skip
    if not BLOCKED:
        acc *= tl.load(xs_m, mask=scaled, other=0.0)[:, None]
        acc *= tl.load(ws_n, mask=inside, other=0.0)[None, :]
    if bias_eN is not None:
        at = bias_eN + expert.to(tl.int64) * stride_be + weight_row.to(tl.int64) * stride_bn
        acc += tl.load(at, mask=inside, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + slot.to(tl.int64) * stride_weight, mask=live, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        # Padding rows are written too: their inputs were zeros, and GEMM2 reads whole blocks.
        h = _activation(acc, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA, GATED).to(DTYPE)
        COLUMNS: tl.constexpr = h.shape[1]
        width = N // 2 if GATED else N
        c = column * COLUMNS + tl.arange(0, COLUMNS)
        if out_scale is not None:
            GROUPS: tl.constexpr = COLUMNS // GROUP
            value = tl.reshape(h.to(tl.float32), [BLOCK_M, GROUPS, GROUP])
            scale = scale_of(tl.max(tl.abs(value), 2))
            group = column * GROUPS + tl.arange(0, GROUPS)
            num_groups = tl.cdiv(width, GROUP)
            at_scale = out_scale + position.to(tl.int64)[:, None] * num_groups + group[None, :]
            tl.store(at_scale, scale, mask=(group < num_groups)[None, :] & (position >= 0)[:, None])
            h = tl.reshape(e4m3_codes(value, scale[:, :, None]), [BLOCK_M, COLUMNS])
        if out_rows is not None:
            out_rows.store([block * BLOCK_M, column * COLUMNS], h)
        else:
            at = out + position.to(tl.int64)[:, None] * stride_or + c.to(tl.int64)[None, :] * stride_oc
            if EVEN_N:
                tl.store(at, h)
            else:
                tl.store(at, h, mask=(c < width)[None, :])
    else:
        at = out + slot.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_oc
        mask = live[:, None] if EVEN_N else live[:, None] & inside[None, :]
        tl.store(at, acc.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["num_slots", "slots_per_row", "stride_xr", "stride_se", "stride_sn", "stride_weight", "GROUP_M"])
def _fused_scaled(
    a, a_rows, a_scale, w, w_scale, bias_eN, out, out_rows, out_scale, weights, sorted_slots, block_expert, num_padded,
    num_slots, slots_per_row, N, K,
    stride_ar, stride_ak, stride_xr, stride_xg, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
    stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    DTYPE: tl.constexpr, BLOCKED: tl.constexpr, WS: tl.constexpr, FAST: tl.constexpr, SWAP: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M,
    TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, PROGRAMS: tl.constexpr, FLAT: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """GEMM1 where NAME is an activation, else GEMM2. PROGRAMS > 0: a persistent grid of that size."""
    after_previous(OVERLAP)
    num_m = tl.load(num_padded) // BLOCK_M
    num_n = tl.cdiv(N, BLOCK_N)
    if PROGRAMS == 0:
        if tl.program_id(0) < num_m * num_n:
            _tile(
                tl.program_id(0), num_m, num_n, a, a_rows, a_scale, w, w_scale, bias_eN, out, out_rows, out_scale, weights,
                sorted_slots, block_expert, num_slots, slots_per_row, N, K,
                stride_ar, stride_ak, stride_xr, stride_xg, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
                stride_be, stride_bn, stride_or, stride_oc, stride_weight, NAME, GATED, PACKED,
                ALPHA, BETA, LIMIT, LINEAR_BETA, DTYPE, BLOCKED, WS, FAST, SWAP, PROMOTE,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_N, EVEN_K,
            )  # fmt: skip
    else:
        for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLAT):
            _tile(
                tile, num_m, num_n, a, a_rows, a_scale, w, w_scale, bias_eN, out, out_rows, out_scale, weights,
                sorted_slots, block_expert, num_slots, slots_per_row, N, K,
                stride_ar, stride_ak, stride_xr, stride_xg, stride_we, stride_wn, stride_wk, stride_se, stride_sn, stride_sg,
                stride_be, stride_bn, stride_or, stride_oc, stride_weight, NAME, GATED, PACKED,
                ALPHA, BETA, LIMIT, LINEAR_BETA, DTYPE, BLOCKED, WS, FAST, SWAP, PROMOTE,
                BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_N, EVEN_K,
            )  # fmt: skip


def _where_scales_lie(N: int, block_n: int, paired: bool) -> str:
    """`one`: a tile's weight rows share a block of 128; `pairs`: its gate rows do, and its up rows; `each`: neither.

    A block begins at every multiple of 128, so a tile whose height divides 128 and whose first row is a multiple of it stays
    inside one. Up rows begin at N / 2.
    """
    if not paired:
        return "one" if 128 % block_n == 0 else "each"
    return "pairs" if 128 % (block_n // 2) == 0 and N // 2 % (block_n // 2) == 0 else "each"


def requantises(tile: Tile, act: Activation, group: int) -> bool:
    """Whether this tile of GEMM1 holds whole groups of h, and so can quantise them."""
    return group == 128 and tile.block_n // act.width_in(1) % group == 0


def _launch(
    a: Tensor,
    a_scale: Tensor,
    w_eNK: Tensor,
    w_scale: Tensor,
    out: Tensor,
    out_scale: Tensor | None,
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    num_slots: int,
    dtype: torch.dtype,
    act: Activation | None,
    bias_eN: Tensor | None,
    weights: Tensor | None,
    overlap: bool,
) -> None:
    _, N, K = w_eNK.shape
    e4m3 = torch.float8_e4m3fn
    check(a.dtype == e4m3 and w_eNK.dtype == e4m3, f"rows are {a.dtype} and weights {w_eNK.dtype}; both must be {e4m3}")
    check(a.size(1) == K, f"rows have {a.size(1)} columns; the weights {tuple(w_eNK.shape)} need {K}")
    check(tile.block_m == alignment.block_m, f"tile {tile} does not fit blocks of {alignment.block_m} rows")
    gated_, packed = act is not None and act.gated, act is not None and not act.interleaved
    blocked = w_scale.size(1) != N or w_scale.size(2) > 1
    check(not blocked or tile.block_k == 128, f"tile {tile}: with blocks of 128 a step is 128 columns long")
    # Triton promotes inside a step only where operands come from registers: not in Hopper's products of 64 rows and more.
    short = tile.fast or tile.block_k <= PROMOTED or (tile.block_m < 64 and not tile.swap)
    check(short, f"tile {tile}: sums are promoted every {PROMOTED} columns, so steps cannot be longer")
    w: Tensor | TensorDescriptor = w_eNK
    a_rows = out_rows = None
    if tile.tma:
        check(describable(w_eNK), f"tile {tile} needs weights with neighbours in the last dim, not strides {w_eNK.stride()}")
        w = _weights_descriptor(w_eNK, tile, gated_ and packed)
        if act is None and tile.block_m >= 64 and not tile.swap and describable(a):
            a_rows = TensorDescriptor(a, list(a.shape), list(a.stride()), [tile.block_m, tile.block_k])
    if tile.bulk and act is not None and describable(out):
        columns = tile.block_n // act.width_in(1)
        out_rows = TensorDescriptor(out, list(out.shape), list(out.stride()), [tile.block_m, columns])
    num_n = triton.cdiv(N, tile.block_n)
    tiles = alignment.num_blocks * num_n
    programs = min(tile.per_sm * processors(a.device), tiles) if tile.per_sm else 0
    _fused_scaled[(programs or tiles,)](
        a, a_rows, a_scale, w, w_scale, bias_eN, out, out_rows, out_scale, weights,
        alignment.sorted_slots, alignment.block_expert, alignment.num_padded, num_slots, slots_per_row, N, K,
        *a.stride(), *a_scale.stride(), *w_eNK.stride(), *w_scale.stride(),
        *(bias_eN.stride() if bias_eN is not None else (0, 0)), *out.stride(), weights.stride(0) if weights is not None else 0,
        NAME=act.name if act else "", GATED=gated_, PACKED=packed,
        ALPHA=(act and act.alpha) or 0.0, BETA=(act and act.beta) or 0.0,
        LIMIT=(act and act.limit) or 0.0, LINEAR_BETA=(act and act.linear_beta) or 0.0,
        DTYPE={torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype],
        BLOCKED=blocked, WS=_where_scales_lie(N, tile.block_n, gated_ and packed) if blocked else "", FAST=tile.fast,
        SWAP=tile.swap, PROMOTE=None if tile.fast else PROMOTED,
        TMA=tile.tma, EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0,
        PROGRAMS=tile.per_sm * processors(a.device), FLAT=tile.flat, **launch_options(overlap), **tile.options,
    )  # fmt: skip


def gate_up_act(
    x: tuple[Tensor, Tensor],
    w1: tuple[Tensor, Tensor],
    h: tuple[Tensor, Tensor | None],
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    act: Activation,
    dtype: torch.dtype,
    b1_eN: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """h[position] = act(x[slot // slots_per_row] @ w1[expert].T (+ b1)) of each sorted position, rounded to `dtype`.

    x and w1 are codes with their scales. h is (values (P, I), None), or codes (P, I) and scales (P, I / 128) where
    `requantises` says that this tile can. Padding rows of blocks in use get what a row of zeros gives.
    """
    num_slots = x[0].size(0) * slots_per_row
    _launch(*x, *w1, *h, alignment, tile, slots_per_row, num_slots, dtype, act, b1_eN, None, overlap)


def down(
    h: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    out_SH: Tensor,
    alignment: Alignment,
    tile: Tile,
    b2_eH: Tensor | None = None,
    weights_S: Tensor | None = None,
    overlap: bool = False,
) -> None:
    """out[slot] = weight[slot] * (h[position of slot] @ w2[expert].T (+ b2)), for live slots; other rows are not touched."""
    _launch(*h, *w2, out_SH, None, alignment, tile, 1, out_SH.size(0), out_SH.dtype, None, b2_eH, weights_S, overlap)
