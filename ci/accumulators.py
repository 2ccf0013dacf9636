"""Measure how matrix products accumulate on this GPU, and write the figures that the bounds rest on.

    python ci/accumulators.py docs/results/accumulators-h100.json

For each product, operand format, kind of data and length K: the largest |error| / (u S) with S = sum |a||w| and u = 2^-24
(2^-13 for fp8 operands, as docs/tolerances.md states its constants), the relative bias on data of one sign, and the share of
results that are not the correctly rounded ones once stored in 16 bits
(fp16 for fp16 operands, else bf16). The reference is a float64 product of the same operands.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from moeproof.harness.reports import results

Tensor = torch.Tensor
M, N = 256, 512
LENGTHS = (512, 2048, 7168)
FORMATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn, "fp32": torch.float32}


@triton.jit
def _product(a_MK, w_NK, out_MN, K, N, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, IMPRECISE: tl.constexpr):
    m = tl.program_id(0) * 64 + tl.arange(0, 64)
    n = tl.program_id(1) * 64 + tl.arange(0, 64)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([64, 64], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_MK + m[:, None] * K + first + k[None, :])
        w = tl.load(w_NK + n[None, :] * K + first + k[:, None])
        acc = tl.dot(a, w, acc, input_precision=PRECISION, max_num_imprecise_acc=IMPRECISE)
    tl.store(out_MN + m[:, None] * N + n[None, :], acc)


@triton.jit
def _promoted(a_MK, w_NK, out_MN, K, N, BLOCK_K: tl.constexpr):
    """Each step's product starts from zero and is added in float32, as block-scaled kernels do."""
    m = tl.program_id(0) * 64 + tl.arange(0, 64)
    n = tl.program_id(1) * 64 + tl.arange(0, 64)
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros([64, 64], tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_MK + m[:, None] * K + first + k[None, :])
        w = tl.load(w_NK + n[None, :] * K + first + k[:, None])
        acc += tl.dot(a, w)
    tl.store(out_MN + m[:, None] * N + n[None, :], acc)


def triton_product(precision: str = "ieee", imprecise: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, w: Tensor) -> Tensor:
        out = torch.empty(M, N, device="cuda")
        step = 32 if a.dtype == torch.float32 else 128
        _product[(M // 64, N // 64)](a, w, out, a.shape[1], N, step, precision, imprecise)
        return out

    return run


def triton_promoted(a: Tensor, w: Tensor) -> Tensor:
    out = torch.empty(M, N, device="cuda")
    _promoted[(M // 64, N // 64)](a, w, out, a.shape[1], N, 128)
    return out


def scaled(fast: bool, out_dtype: torch.dtype = torch.float32) -> Callable[[Tensor, Tensor], Tensor]:
    one = torch.ones((), device="cuda")
    return lambda a, w: torch._scaled_mm(a, w.T, one, one, out_dtype=out_dtype, use_fast_accum=fast).float()


def grouped(a: Tensor, w: Tensor) -> Tensor:
    ends = torch.tensor([M], dtype=torch.int32, device="cuda")
    return torch._grouped_mm(a, w[None].transpose(1, 2), offs=ends).float()


def products(name: str) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    if name == "fp32":
        return {"triton ieee": triton_product(), "triton tf32": triton_product("tf32"), "torch": lambda a, w: a @ w.T}
    if name == "fp8":
        return {
            "triton, default": triton_product(),
            "triton, 128 imprecise": triton_product(imprecise=128),
            "triton, 0 imprecise": triton_product(imprecise=0),
            "triton, added per 128": triton_promoted,
            "torch scaled, fast": scaled(True),
            "torch scaled, slow": scaled(False),
            "torch scaled, fast, stored": scaled(True, torch.bfloat16),
        }
    plain = {"triton": triton_product(), "torch, stored": lambda a, w: (a @ w.T).float()}
    return plain | ({"torch grouped, stored": grouped} if name == "bf16" else {})


def operands(kind: str, K: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator("cuda").manual_seed(seed)
    a, w = (torch.randn(rows, K, generator=rng, device="cuda") for rows in (M, N))
    if kind == "one sign":
        a, w = a.abs(), w.abs()
    if kind == "outlier":
        hit = torch.rand(a.shape, generator=rng, device="cuda") < 1 / 256
        a = torch.where(hit, a * 32, a)
    return a.to(dtype), w.to(dtype)


def measure() -> Iterator[dict[str, object]]:
    for name, dtype in FORMATS.items():
        unit = 2.0**-13 if name == "fp8" else 2.0**-24
        for label, run in products(name).items():
            for kind in ("gauss", "outlier", "one sign"):
                for K in LENGTHS:
                    yield _point(name, dtype, unit, label, run, kind, K)


def _point(
    name: str, dtype: torch.dtype, unit: float, label: str, run: Callable[[Tensor, Tensor], Tensor], kind: str, K: int
) -> dict[str, object]:
    row: dict[str, object] = {"operands": name, "product": label, "data": kind, "K": K, "unit": unit}
    try:
        a, w = operands(kind, K, dtype, K)
        got = run(a, w).double()
    except Exception as error:  # what this machine cannot do is a figure too
        return row | {"error": str(error).split("\n")[0][:200]}
    exact = a.double() @ w.double().T
    S = a.double().abs() @ w.double().abs().T
    # Results stored in 16 bits carry one rounding more: it is taken off.
    half_ulp = torch.zeros_like(exact)
    narrow = torch.float16 if name == "fp16" else torch.bfloat16
    if "stored" in label:
        half_ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) - (10 if name == "fp16" else 7) - 1)
    excess = ((got - exact).abs() - half_ulp).clamp(min=0)
    misrounded = (got.float().to(narrow) != exact.float().to(narrow)).double().mean()
    return row | {
        "worst_over_uS": float((excess / (unit * S)).max()),
        "relative_bias": float(((got - exact) / exact.abs()).mean()) if kind == "one sign" else None,
        "misrounded_16bit": float(misrounded),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    rows = list(measure())
    results.write(options.output, results.origin("cuda", options.output) | {"shape": {"M": M, "N": N}, "rows": rows})
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
