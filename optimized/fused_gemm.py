"""GEMM1 with the activation and GEMM2 with the router weight in the epilogue, for 16-bit rows and weights.

Between the products, rows lie in sorted order (row = position in the alignment, padding rows included), so that GEMM2
reads whole blocks of neighbours. Weights come by pointers (decode: many small programs, bound by weight bytes) or by
tensor descriptors in a persistent grid (prefill: bound by the tensor cores).

A gated GEMM1 computes a gate column and its up column side by side: column 2j of a tile is gate j, 2j + 1 is up j,
however the weights are packed. Both values of a pair then lie in one thread, and the split moves no data.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from moeproof.optimized.activation import _at_most, _within, gated, ungated
from moeproof.optimized.align import Alignment
from moeproof.optimized.elementary import quick_sigmoid
from moeproof.optimized.grouped_gemm import _multiply, _swizzle
from moeproof.optimized.overlap import after_previous, launch_options
from moeproof.optimized.tiles import Tile, processors
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check


@triton.jit
def _quickly_gated(
    g, u, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr
):
    """The activation of a gate and an up value. The result is rounded to 16 bits at once: silu may be hardware's exp."""
    if NAME == "silu":
        if LIMIT > 0:
            g = _at_most(g, LIMIT)
            u = _within(u, LIMIT)
        h = g * quick_sigmoid(g, 1.0) * u
    elif NAME == "swigluoai" or NAME == "swigluoai_uninterleave":
        g = _at_most(g, LIMIT)
        h = g * quick_sigmoid(g, ALPHA) * (_within(u, LIMIT) + BETA)
    else:
        h = gated(g, u, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA)
    return h


@triton.jit
def _activation(
    acc, NAME: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """(M, N / 2) of (gate, up) pairs, or (M, N)."""
    if GATED:
        g, u = tl.split(tl.reshape(acc, (acc.shape[0], acc.shape[1] // 2, 2)))
        h = _quickly_gated(g, u, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA)
    else:
        h = ungated(acc, NAME)
    return h


@triton.jit
def _multiply_described(
    a_m, a_live, stride_ak, a_rows, w, expert, block, column, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PAIRED: tl.constexpr, DESCRIBED_A: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N); weights by descriptor, rows by pointers a_m or by descriptor a_rows."""
    k = tl.arange(0, BLOCK_K)
    a = a_m[:, None] + k.to(tl.int64)[None, :] * stride_ak
    step = tl.full([], BLOCK_K, tl.int64) * stride_ak
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if DESCRIBED_A:
            a_tile = a_rows.load([block * BLOCK_M, first])
        else:
            mask = a_live[:, None] if EVEN_K else a_live[:, None] & (k < K - first)[None, :]
            a_tile = tl.load(a, mask=mask, other=0.0)
            a += step
        if PAIRED:
            w_tile = w.load([expert, column * (BLOCK_N // 2), 0, first])
        else:
            w_tile = w.load([expert, column * BLOCK_N, first])
        acc = tl.dot(a_tile, tl.reshape(w_tile, (BLOCK_N, BLOCK_K)).T, acc)
    return acc


@triton.jit
def _tile(
    tile, num_m, num_n, a, a_rows, w, bias_eN, out, out_rows, weights, sorted_slots, block_expert,
    num_slots, slots_per_row, N, K,
    stride_ar, stride_ak, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M,
    TMA: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    FIRST: tl.constexpr = NAME != ""
    block, column = _swizzle(tile, num_m, num_n, GROUP_M)
    expert = tl.load(block_expert + block)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    slot = tl.load(sorted_slots + position)
    live = slot < num_slots
    row = slot // slots_per_row if FIRST else position
    a_m = a + row.to(tl.int64) * stride_ar
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = n // 2 + n % 2 * (N // 2) if GATED and PACKED else n
    if TMA:
        acc = _multiply_described(
            a_m, live, stride_ak, a_rows, w, expert, block, column, K,
            BLOCK_M, BLOCK_N, BLOCK_K, GATED and PACKED, a_rows is not None, EVEN_K,
        )  # fmt: skip
    else:
        w_n = w + expert.to(tl.int64) * stride_we + weight_row.to(tl.int64) * stride_wn
        acc = _multiply(a_m, live, w_n, n < N, stride_ak, stride_wk, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K)
    if bias_eN is not None:
        at = bias_eN + expert.to(tl.int64) * stride_be + weight_row.to(tl.int64) * stride_bn
        acc += tl.load(at, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if weights is not None:
        acc *= tl.load(weights + slot.to(tl.int64) * stride_weight, mask=live, other=0.0).to(tl.float32)[:, None]
    if FIRST:
        # Padding rows are written too: their inputs were zeros, and GEMM2 reads whole blocks.
        h = _activation(acc, NAME, ALPHA, BETA, LIMIT, LINEAR_BETA, GATED)
        c = column * h.shape[1] + tl.arange(0, h.shape[1])
        at = out + position.to(tl.int64)[:, None] * stride_or + c.to(tl.int64)[None, :] * stride_oc
        if out_rows is not None:
            out_rows.store([block * BLOCK_M, column * h.shape[1]], h.to(out.dtype.element_ty))
        elif EVEN_N:
            tl.store(at, h.to(out.dtype.element_ty))
        else:
            tl.store(at, h.to(out.dtype.element_ty), mask=(c < (N // 2 if GATED else N))[None, :])
    else:
        at = out + slot.to(tl.int64)[:, None] * stride_or + n.to(tl.int64)[None, :] * stride_oc
        mask = live[:, None] if EVEN_N else live[:, None] & (n < N)[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_slots", "slots_per_row", "stride_weight", "GROUP_M"])
def _fused(
    a, a_rows, w, bias_eN, out, out_rows, weights, sorted_slots, block_expert, num_padded, num_slots, slots_per_row, N, K,
    stride_ar, stride_ak, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_or, stride_oc, stride_weight,
    NAME: tl.constexpr, GATED: tl.constexpr, PACKED: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr, LINEAR_BETA: tl.constexpr,
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
                tl.program_id(0), num_m, num_n, a, a_rows, w, bias_eN, out, out_rows, weights, sorted_slots, block_expert,
                num_slots, slots_per_row, N, K, stride_ar, stride_ak, stride_we, stride_wn, stride_wk,
                stride_be, stride_bn, stride_or, stride_oc, stride_weight, NAME, GATED, PACKED,
                ALPHA, BETA, LIMIT, LINEAR_BETA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_N, EVEN_K,
            )  # fmt: skip
    else:
        for tile in tl.range(tl.program_id(0), num_m * num_n, PROGRAMS, flatten=FLAT):
            _tile(
                tile, num_m, num_n, a, a_rows, w, bias_eN, out, out_rows, weights, sorted_slots, block_expert,
                num_slots, slots_per_row, N, K, stride_ar, stride_ak, stride_we, stride_wn, stride_wk,
                stride_be, stride_bn, stride_or, stride_oc, stride_weight, NAME, GATED, PACKED,
                ALPHA, BETA, LIMIT, LINEAR_BETA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, TMA, EVEN_N, EVEN_K,
            )  # fmt: skip


def describable(t: torch.Tensor) -> bool:
    """Whether a tensor descriptor can name it: neighbours in the last dim, everything else in steps of 16 bytes."""
    steps = [s * t.element_size() for s in t.stride()[:-1]]
    return t.stride(-1) == 1 and t.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps)


def _weights_descriptor(w_eNK: torch.Tensor, tile: Tile, paired: bool) -> TensorDescriptor:
    """Blocks of block_n rows of one expert; `paired` interleaves row j of the first half with row j of the second."""
    e, N, K = w_eNK.shape
    stride_e, stride_n, _ = w_eNK.stride()
    if paired:
        strides = [stride_e, stride_n, N // 2 * stride_n, 1]
        return TensorDescriptor(w_eNK, [e, N // 2, 2, K], strides, [1, tile.block_n // 2, 2, tile.block_k])
    return TensorDescriptor(w_eNK, [e, N, K], [stride_e, stride_n, 1], [1, tile.block_n, tile.block_k])


def _launch(
    a: torch.Tensor,
    w_eNK: torch.Tensor,
    out: torch.Tensor,
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    num_slots: int,
    act: Activation | None,
    bias_eN: torch.Tensor | None,
    weights: torch.Tensor | None,
    overlap: bool,
) -> None:
    _, N, K = w_eNK.shape
    check(a.dtype == w_eNK.dtype, f"rows are {a.dtype} and weights {w_eNK.dtype}; they must be equal")
    check(a.dtype in (torch.float16, torch.bfloat16), f"rows are {a.dtype}; allowed: torch.float16, torch.bfloat16")
    check(a.size(1) == K, f"rows have {a.size(1)} columns; the weights {tuple(w_eNK.shape)} need {K}")
    check(tile.block_m == alignment.block_m, f"tile {tile} does not fit blocks of {alignment.block_m} rows")
    gated_, packed = act is not None and act.gated, act is not None and not act.interleaved
    w: torch.Tensor | TensorDescriptor = w_eNK
    a_rows = None
    if tile.tma:
        check(describable(w_eNK), f"tile {tile} needs weights with neighbours in the last dim, not strides {w_eNK.stride()}")
        w = _weights_descriptor(w_eNK, tile, gated_ and packed)
        if act is None and tile.block_m >= 64 and describable(a):
            # Sorted rows are neighbours. Below 64 rows the product reads them from registers, and copies cost more.
            a_rows = TensorDescriptor(a, list(a.shape), list(a.stride()), [tile.block_m, tile.block_k])
    out_rows = None
    if tile.bulk and act is not None and describable(out):
        columns = tile.block_n // 2 if gated_ else tile.block_n
        out_rows = TensorDescriptor(out, list(out.shape), list(out.stride()), [tile.block_m, columns])
    num_n = triton.cdiv(N, tile.block_n)
    tiles = alignment.num_blocks * num_n
    programs = min(tile.per_sm * processors(a.device), tiles) if tile.per_sm else 0
    _fused[(programs or tiles,)](
        a, a_rows, w, bias_eN, out, out_rows, weights, alignment.sorted_slots, alignment.block_expert, alignment.num_padded,
        num_slots, slots_per_row, N, K, *a.stride(), *w_eNK.stride(), *(bias_eN.stride() if bias_eN is not None else (0, 0)),
        *out.stride(), weights.stride(0) if weights is not None else 0,
        NAME=act.name if act else "", GATED=gated_, PACKED=packed,
        ALPHA=(act and act.alpha) or 0.0, BETA=(act and act.beta) or 0.0,
        LIMIT=(act and act.limit) or 0.0, LINEAR_BETA=(act and act.linear_beta) or 0.0,
        TMA=tile.tma, EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0,
        PROGRAMS=tile.per_sm * processors(a.device), FLAT=tile.flat, **launch_options(overlap), **tile.options,
    )  # fmt: skip


def gate_up_act(
    x_TH: torch.Tensor,
    w1_eNH: torch.Tensor,
    h_PI: torch.Tensor,
    alignment: Alignment,
    tile: Tile,
    slots_per_row: int,
    act: Activation,
    b1_eN: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """h[position] = act(x[slot // slots_per_row] @ w1[expert].T (+ b1)) of each sorted position; padding rows of blocks in
    use get what a row of zeros gives, rows beyond them are not touched. h is contiguous (P, I)."""
    num_slots = x_TH.size(0) * slots_per_row
    _launch(x_TH, w1_eNH, h_PI, alignment, tile, slots_per_row, num_slots, act, b1_eN, None, overlap)


def down(
    h_PI: torch.Tensor,
    w2_eHI: torch.Tensor,
    out_SH: torch.Tensor,
    alignment: Alignment,
    tile: Tile,
    b2_eH: torch.Tensor | None = None,
    weights_S: torch.Tensor | None = None,
    overlap: bool = False,
) -> None:
    """out[slot] = weight[slot] * (h[position of slot] @ w2[expert].T (+ b2)), for live slots; other rows are not touched."""
    _launch(h_PI, w2_eHI, out_SH, alignment, tile, 1, out_SH.size(0), None, b2_eH, weights_S, overlap)
