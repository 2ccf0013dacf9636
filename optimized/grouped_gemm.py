"""GEMM1 and GEMM2: rows times their expert's weights, float32 accumulation, one rounding. Two layouts, one inner product.

Standard: rows are gathered by sorted slot and the result is written to row = slot. Batched: one region per expert,
rows beyond the expert's count are neither read nor written.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from moeproof.optimized.align import Alignment
from moeproof.optimized.tiles import gemm_tile, processors, rows_per_block
from moeproof.reference.contract.errors import check

FULL_WAVES = 8
"""Programs for each multiprocessor that a batched product has at least, where its regions are large enough."""


@triton.jit
def _swizzle(pid, num_m, num_n, GROUP_M):
    """(block row, block column): GROUP_M block rows take turns at each column, so that they share its weights in L2."""
    first = pid // (GROUP_M * num_n) * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    inside = pid % (GROUP_M * num_n)
    return first + inside % height, inside // height


@triton.jit
def _multiply(
    a_m, a_live, w_n, n_live, stride_ak, stride_wk, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """float32 (BLOCK_M, BLOCK_N): rows at pointers a_m times columns at pointers w_n. Offsets are 64-bit throughout."""
    k = tl.arange(0, BLOCK_K)
    a = a_m[:, None] + k.to(tl.int64)[None, :] * stride_ak
    w = w_n[None, :] + k.to(tl.int64)[:, None] * stride_wk
    step_a = tl.full([], BLOCK_K, tl.int64) * stride_ak
    step_w = tl.full([], BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        a_mask = a_live[:, None] if EVEN_K else a_live[:, None] & (k < K - first)[None, :]
        a_tile = tl.load(a, mask=a_mask, other=0.0)
        if EVEN_N and EVEN_K:
            w_tile = tl.load(w)
        elif EVEN_N:
            w_tile = tl.load(w, mask=(k < K - first)[:, None], other=0.0)
        elif EVEN_K:
            w_tile = tl.load(w, mask=n_live[None, :], other=0.0)
        else:
            w_tile = tl.load(w, mask=(k < K - first)[:, None] & n_live[None, :], other=0.0)
        acc = tl.dot(a_tile, w_tile, acc, input_precision="ieee")
        a += step_a
        w += step_w
    return acc


@triton.jit
def _grouped(
    a_RK, w_eNK, bias_eN, out_SN, sorted_slots, block_expert, num_padded, num_slots, N, K, slots_per_row,
    stride_ar, stride_ak, stride_we, stride_wn, stride_wk, stride_be, stride_bn, stride_os, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    num_m = tl.load(num_padded) // BLOCK_M
    num_n = tl.cdiv(N, BLOCK_N)
    if tl.program_id(0) >= num_m * num_n:
        return
    block, column = _swizzle(tl.program_id(0), num_m, num_n, GROUP_M)
    expert = tl.load(block_expert + block).to(tl.int64)
    if expert < 0:
        return
    slot = tl.load(sorted_slots + block * BLOCK_M + tl.arange(0, BLOCK_M))
    live = slot < num_slots
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    a_m = a_RK + (slot // slots_per_row).to(tl.int64) * stride_ar
    w_n = w_eNK + expert * stride_we + n.to(tl.int64) * stride_wn
    acc = _multiply(a_m, live, w_n, n < N, stride_ak, stride_wk, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K)
    if bias_eN is not None:
        bias = tl.load(bias_eN + expert * stride_be + n.to(tl.int64) * stride_bn, mask=n < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    out = out_SN + slot.to(tl.int64)[:, None] * stride_os + n.to(tl.int64)[None, :] * stride_on
    tl.store(out, acc.to(out_SN.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


@triton.jit
def _batched(
    a_eCK, w_eNK, bias_eN, out_eCN, counts, turns, C, N, K,
    stride_ae, stride_ac, stride_ak, stride_we, stride_wn, stride_wk, stride_be, stride_bn,
    stride_oe, stride_oc, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """A program takes every `turns`-th row block in use of one expert at one column: no program has none but those of empty
    experts, however large the regions are, and a column's weights are read from L2 the next time."""
    num_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (turns * num_n)
    count = tl.minimum(tl.load(counts + expert), C)
    expert = expert.to(tl.int64)
    n = tl.program_id(0) % num_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_n = w_eNK + expert * stride_we + n.to(tl.int64) * stride_wn
    for first in range(tl.program_id(0) // num_n % turns * BLOCK_M, count, turns * BLOCK_M):
        row = first + tl.arange(0, BLOCK_M)
        live = row < count
        a_m = a_eCK + expert * stride_ae + row.to(tl.int64) * stride_ac
        acc = _multiply(a_m, live, w_n, n < N, stride_ak, stride_wk, K, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_N, EVEN_K)
        if bias_eN is not None:
            bias = tl.load(bias_eN + expert * stride_be + n.to(tl.int64) * stride_bn, mask=n < N, other=0.0)
            acc += bias.to(tl.float32)[None, :]
        out = out_eCN + expert * stride_oe + row.to(tl.int64)[:, None] * stride_oc + n.to(tl.int64)[None, :] * stride_on
        tl.store(out, acc.to(out_eCN.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])


def _check(a: torch.Tensor, w_eNK: torch.Tensor, bias_eN: torch.Tensor | None, out: torch.Tensor) -> None:
    e, N, K = w_eNK.shape
    check(
        a.size(-1) == K and out.size(-1) == N,
        f"rows have {a.size(-1)} columns and the output {out.size(-1)}; the weights {tuple(w_eNK.shape)} need {K} and {N}",
    )
    check(a.dtype == w_eNK.dtype, f"rows are {a.dtype} and weights {w_eNK.dtype}; they must be equal")
    check(
        a.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"rows are {a.dtype}; allowed: torch.float32, torch.float16, torch.bfloat16",
    )
    check(
        bias_eN is None or bias_eN.shape == (e, N),
        f"bias is {None if bias_eN is None else tuple(bias_eN.shape)}, must be ({e}, {N})",
    )


def _bias_strides(bias_eN: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if bias_eN is None else (bias_eN.stride(0), bias_eN.stride(1))


def grouped_gemm(
    a_RK: torch.Tensor,
    w_eNK: torch.Tensor,
    out_SN: torch.Tensor,
    alignment: Alignment,
    slots_per_row: int,
    bias_eN: torch.Tensor | None = None,
) -> None:
    """out[slot] = a[slot // slots_per_row] @ w[expert of slot].T (+ bias), for live slots; other rows are not touched.

    a (R, K) in the weights' dtype, w (e, N, K), out (S, N); any strides. GEMM1 has slots_per_row = K, GEMM2 has 1.
    """
    _check(a_RK, w_eNK, bias_eN, out_SN)
    S, (_, N, K) = out_SN.size(0), w_eNK.shape
    if S == 0:
        return
    tile = gemm_tile(alignment.block_m, N, K, a_RK.dtype)
    grid = (alignment.num_blocks * triton.cdiv(N, tile.block_n),)
    _grouped[grid](
        a_RK, w_eNK, bias_eN, out_SN,
        alignment.sorted_slots, alignment.block_expert, alignment.num_padded, S, N, K, slots_per_row,
        *a_RK.stride(), *w_eNK.stride(), *_bias_strides(bias_eN), *out_SN.stride(),
        EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0, **tile.options,
    )  # fmt: skip


def batched_gemm(
    a_eCK: torch.Tensor,
    w_eNK: torch.Tensor,
    out_eCN: torch.Tensor,
    counts: torch.Tensor,
    bias_eN: torch.Tensor | None = None,
    mean_rows: int | None = None,
) -> None:
    """out[e, c] = a[e, c] @ w[e].T (+ bias) for c < counts[e]; other rows are neither read nor written.

    a (e, C, K), w (e, N, K), out (e, C, N), any strides; counts int32 (e,).
    mean_rows, a guess of the mean count, only chooses the tile.
    """
    _check(a_eCK, w_eNK, bias_eN, out_eCN)
    (e, C, K), N = a_eCK.shape, w_eNK.size(1)
    check(
        counts.shape == (e,) and counts.dtype == torch.int32 and counts.is_contiguous(),
        f"expert_num_tokens is {counts.dtype} {tuple(counts.shape)}, must be contiguous int32 ({e},)",
    )
    if C == 0:
        return
    tile = gemm_tile(rows_per_block(C if mean_rows is None else mean_rows, 1), N, K, a_eCK.dtype)
    if K % 16:
        # Pointers of each element, kept over all of a program's blocks.
        tile = replace(tile, block_n=min(tile.block_n, 64))
    num_n = triton.cdiv(N, tile.block_n)
    # Few experts and columns: several programs share the row blocks of each.
    turns = min(triton.cdiv(C, tile.block_m), triton.cdiv(FULL_WAVES * processors(a_eCK.device), e * num_n))
    options = {name: value for name, value in tile.options.items() if name != "GROUP_M"}
    _batched[(e * turns * num_n,)](
        a_eCK, w_eNK, bias_eN, out_eCN, counts, turns, C, N, K,
        *a_eCK.stride(), *w_eNK.stride(), *_bias_strides(bias_eN), *out_eCN.stride(),
        EVEN_N=N % tile.block_n == 0, EVEN_K=K % tile.block_k == 0, **options,
    )  # fmt: skip
