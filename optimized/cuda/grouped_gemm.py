"""GEMM1 and GEMM2 in bf16 on torch's grouped product, with rows gathered and scattered by an Alignment.

Why this library: torch ships CUTLASS's grouped kernel compiled, with its group sizes on the device. There is nothing to
install or compile, nothing waits, and a graph can hold it. cuBLAS's grouped product (cublasGemmGroupedBatchedEx) takes the
group sizes from host memory: each call would have to wait for the router. CUTLASS's own headers (the BSD-licensed wheel
nvidia-cutlass) give the same kernels for minutes of compiling on the user's machine.
"""

from __future__ import annotations

import torch

from moeproof.optimized import torch_grouped
from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import library
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.problem import Problem


def unsupported(problem: Problem) -> str | None:
    """Why this product cannot do the problem, or None."""
    if problem.dtype != "bf16":
        return f"torch's grouped product is bf16 only on CUDA, not {problem.dtype}"
    return torch_grouped.unsupported(problem)


def _move(source: torch.Tensor, target: torch.Tensor, alignment: Alignment, S: int, slots_per_row: int, scatter: bool) -> None:
    library.call(
        "rows", "moeproof_rows", source.device,
        dtype=source.dtype, P=alignment.sorted_slots.numel(), H=source.size(1), num_slots=S, slots_per_row=slots_per_row,
        scatter=scatter, sorted_slots=alignment.sorted_slots, num_padded=alignment.num_padded,
        stride_sr=source.stride(0), stride_sh=source.stride(1), stride_tr=target.stride(0), stride_th=target.stride(1),
        source=source, target=target,
    )  # fmt: skip


def gather(x_RK: torch.Tensor, alignment: Alignment, S: int, slots_per_row: int) -> torch.Tensor:
    """(P, K): row p is x[sorted_slots[p] // slots_per_row]; zeros in padding, unwritten from num_padded on."""
    library.check_tensors(x=x_RK, sorted_slots=alignment.sorted_slots)
    rows = torch.empty(alignment.sorted_slots.numel(), x_RK.size(1), dtype=x_RK.dtype, device=x_RK.device)
    _move(x_RK, rows, alignment, S, slots_per_row, scatter=False)
    return rows


def scatter(rows_PN: torch.Tensor, out_SN: torch.Tensor, alignment: Alignment) -> None:
    """out[sorted_slots[p]] = rows[p]. Rows of `out` that no p names are not written."""
    library.check_tensors(rows=rows_PN, out=out_SN, sorted_slots=alignment.sorted_slots)
    _move(rows_PN, out_SN, alignment, out_SN.size(0), 1, scatter=True)


def group_ends(alignment: Alignment) -> torch.Tensor:
    """int32 (e,): rows of `sorted_slots` up to the end of each expert's padded group."""
    ends = torch.empty_like(alignment.counts)
    library.call(
        "rows", "moeproof_ends", ends.device,
        counts=alignment.counts, e=ends.numel(), block_m=alignment.block_m, ends=ends,
    )  # fmt: skip
    return ends


def grouped_gemm(
    a_RK: torch.Tensor,
    w_eNK: torch.Tensor,
    out_SN: torch.Tensor,
    alignment: Alignment,
    slots_per_row: int,
    bias_eN: torch.Tensor | None = None,
) -> None:
    """out[s] = a[s // slots_per_row] @ w[expert of s].T for every live slot s; other rows are not written.

    The signature of optimized.grouped_gemm. bfloat16 only; rows of 16 bytes; no bias, which would be added after rounding.
    """
    check(bias_eN is None, "torch's grouped product adds no bias before it rounds; bias must be None")
    check(a_RK.dtype == torch.bfloat16, f"torch's grouped product is bfloat16 on CUDA, not {a_RK.dtype}")
    check(a_RK.dtype == w_eNK.dtype == out_SN.dtype, f"w is {w_eNK.dtype}, out {out_SN.dtype}; both must be {a_RK.dtype}")
    check(a_RK.size(1) == w_eNK.size(2), f"rows have {a_RK.size(1)} columns, w {w_eNK.size(2)}; they must be equal")
    if not alignment.num_blocks:
        return
    rows = gather(a_RK, alignment, out_SN.size(0), slots_per_row)
    scatter(torch_grouped.product(rows, w_eNK, group_ends(alignment)), out_SN, alignment)


def batched_gemm(
    a_eCK: torch.Tensor,
    w_eNK: torch.Tensor,
    out_eCN: torch.Tensor,
    counts: torch.Tensor,
    bias_eN: torch.Tensor | None = None,
    mean_rows: int | None = None,
) -> None:
    """out[e, c] = a[e, c] @ w[e].T of whole regions: from c = counts[e] on, rows come of whatever stands in a's.

    The signature of optimized.grouped_gemm.batched_gemm. bfloat16 only; rows of 16 bytes; no bias. Each row is made of its own
    row of `a` alone, so that what lies behind a count reaches no other. A product that took the counts would need its rows
    without gaps: what is saved by whole regions is the gather.
    """
    check(bias_eN is None, "torch's grouped product adds no bias before it rounds; bias must be None")
    check(a_eCK.dtype == torch.bfloat16, f"torch's grouped product is bfloat16 on CUDA, not {a_eCK.dtype}")
    check(a_eCK.dtype == w_eNK.dtype == out_eCN.dtype, f"w is {w_eNK.dtype}, out {out_eCN.dtype}; both must be {a_eCK.dtype}")
    check(
        counts.shape == (a_eCK.size(0),) and a_eCK.size(0) == w_eNK.size(0),
        f"there are {a_eCK.size(0)} regions of rows, {w_eNK.size(0)} experts and {counts.numel()} counts; they must be equal",
    )
    if out_eCN.numel():
        out_eCN.copy_(torch_grouped.batched_product(a_eCK, w_eNK))
