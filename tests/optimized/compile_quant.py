"""Compiles the quantised launches of unmodified host code for sm_90, as compile_only.py does for the others.

python tests/optimized/compile_quant.py [SCHEME ..]
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from compile_only import Driver
from triton.runtime import driver

from moeproof.optimized.align import Alignment
from moeproof.optimized.quant.gemm import Rows, Weights, batched_scaled_gemm, grouped_scaled_gemm
from moeproof.optimized.quant.quantise import _quantise, quantise
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, QuantScheme
from moeproof.reference.contract.schemes import Quantiser

BF16 = FORMATS["bf16"]
E, N, K = 8, 768, 2048


def operand(q: Quantiser, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = torch.empty(q.scale_shape(*shape), dtype=q.scale_format(BF16).dtype)
    return torch.empty(q.code_shape(*shape), dtype=q.format.dtype), scale


def quantisers(scheme: QuantScheme) -> None:
    """QUANT1 of long and short rows, QUANT2 with its activation."""
    for q, columns, act in (
        (scheme.a1, 7168, None),
        (scheme.a2, 2048, Activation()),
        (scheme.a2, 16384, Activation()),
        (scheme.a1, 32768, None),
    ):
        if q is not None:
            x = torch.empty(512, columns if act is None else act.width_in(columns), dtype=torch.bfloat16)
            quantise(x, q, BF16, torch.ones(1, 1) if q.static else None, act=act)


def turned(codes: torch.Tensor) -> torch.Tensor:
    """The same codes as a transposed view: stored K first."""
    return codes.view(torch.uint8).transpose(1, 2).contiguous().transpose(1, 2).view(codes.dtype)


def product(scheme: QuantScheme, n: int, k: int, block_m: int, kn: bool = False) -> None:
    """One standard product of block_m rows, and a batched one where block_m is 64."""
    q, w = scheme.a1, scheme.w
    assert w is not None
    level = torch.empty(E, 1, 1) if w.two_level else None
    zp = torch.empty(E, n // 2, w.groups(k), dtype=torch.uint8) if w.zero_points else None
    codes, scale = operand(w, E, n, k)
    bias = torch.empty(E, n, dtype=torch.bfloat16)
    weights = Weights(turned(codes) if kn else codes, w, scale, zp, level, bias)
    one = torch.empty(1, dtype=torch.int32)

    def rows(*shape: int) -> Rows:
        if q is None:
            return Rows(torch.empty(shape, dtype=torch.bfloat16))
        codes, scale = operand(q, *shape)
        return Rows(codes, q, scale, torch.empty(1, 1) if q.two_level else None)

    out = torch.empty(block_m, n, dtype=torch.bfloat16)
    alignment = Alignment(torch.empty(block_m, dtype=torch.int32), one, one, one, block_m)
    grouped_scaled_gemm(rows(block_m, k), weights, out, alignment, 1, BF16)
    if block_m == 64:
        out = torch.empty(E, 64, n, dtype=torch.bfloat16)
        batched_scaled_gemm(rows(E, 64, k), weights, out, torch.empty(E, dtype=torch.int32), BF16)


def products(scheme: QuantScheme) -> None:
    """Every number of rows of a tile; weights stored K first; rows that start anywhere; the smallest sizes."""
    assert scheme.w is not None
    ragged = all(q is None or q.ragged for q in (scheme.a1, scheme.w))
    group = scheme.w.group[1]
    least = 1 if ragged else max(group, scheme.a1.group[1] if scheme.a1 is not None else 0)
    for case in (
        *((N, K, block_m) for block_m in (16, 32, 64, 128)),
        (N, K, 128, True),
        (136, 200, 128) if ragged else (136, 3 * least, 128),
        (2, least, 16),
    ):
        Driver.case = f"{scheme.name} {case}"
        product(scheme, *case)


def fused_multiplies() -> int:
    """fma instructions in the PTX of all quantisers: fl(x f) must not be fused into the addition that rounds it."""
    caches = (cache[0].values() for cache in _quantise.device_caches.values())
    return sum(kernel.asm["ptx"].count("fma.rn") for cache in caches for kernel in cache)


def main(names: list[str]) -> None:
    """Compile these schemes; all without names."""
    driver.set_active(Driver())
    for name in names or [n for n, s in SCHEMES.items() if s.quantised]:
        Driver.case = name
        quantisers(SCHEMES[name])
        products(SCHEMES[name])
    print(json.dumps({"kernel": "_quantise", "fused multiplies": fused_multiplies(), "stack": 0, "registers": 0}))


if __name__ == "__main__":
    assert not triton.knobs.runtime.interpret, "compiling needs a process without TRITON_INTERPRET"
    main(sys.argv[1:])
