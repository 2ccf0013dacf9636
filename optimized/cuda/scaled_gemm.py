"""GEMM1 and GEMM2 of scheme fp8_token on torch's scaled grouped product, with rows gathered and scattered by an Alignment.

Why this library: as in grouped_gemm.py. CUTLASS's kernel for Hopper lies compiled inside torch, and takes its group sizes on
the device. It scales rows and channels; for scales of blocks torch has products of one group only (cuBLASLt), whose sizes the
host would have to know: there Triton's product is the one to mix with.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda.grouped_gemm import gather, group_ends, scatter
from moeproof.optimized.quant import torch_scaled
from moeproof.optimized.quant.gemm import Rows, Weights
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL

Tensor = torch.Tensor


def unsupported(problem: Problem) -> str | None:
    """Why this product cannot do the problem on this machine, or None."""
    # A weight on the input is this folder's own kernel's business.
    return torch_scaled.unsupported(replace(problem, weight_on_input=False))


def product(codes_PA: Tensor, scale_P: Tensor, w_eNA: Tensor, scale_eN: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """(P, N) of rows of codes with each group's weights; groups end before row ends[g]. Later rows are undefined."""
    return torch._scaled_grouped_mm(
        codes_PA, w_eNA.contiguous().transpose(-2, -1), scale_P, scale_eN.contiguous(),
        offs=ends, out_dtype=dtype, use_fast_accum=False,
    )  # fmt: skip


def scaled_grouped_gemm(x: Rows, w: Weights, out_SN: Tensor, alignment: Alignment, slots_per_row: int, dtype: Format) -> None:
    """out[s] = x[s // slots_per_row] @ w[expert of s].T, both decoded, for every live slot s; other rows are not written.

    The signature of optimized.quant.gemm.grouped_scaled_gemm. Codes e4m3, scales float32 of rows and channels; no bias, which
    would be added after rounding.
    """
    for name, q in (("rows", x.quantiser), ("weights", w.quantiser)):
        check(
            q is not None and (q.fmt, q.group, q.scale) == ("e4m3fn", (1, ALL), "fp32"),
            f"torch's scaled grouped product takes e4m3fn {name} with a float32 scale for each",
        )
    check(w.bias is None, "torch's scaled grouped product adds no bias before it rounds; bias must be None")
    check(out_SN.dtype == torch.bfloat16, f"torch's scaled grouped product gives bfloat16, not {out_SN.dtype}")
    if not alignment.num_blocks:
        return
    assert x.scale is not None
    S = out_SN.size(0)
    # Codes are moved two at a time, as the 16-bit patterns that they are: their rows are whole packs.
    codes = gather(x.values.view(torch.bfloat16), alignment, S, slots_per_row).view(x.values.dtype)
    scales = gather(x.scale, alignment, S, slots_per_row).flatten()
    rows = product(codes, scales, w.codes, w.scale.flatten(1), group_ends(alignment), out_SN.dtype)
    scatter(rows, out_SN, alignment)
