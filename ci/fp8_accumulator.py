"""Measure how this GPU adds up fp8 products, and write the figures that the accumulator bounds are held against.

    python ci/fp8_accumulator.py docs/results/fp8_accumulator_h100.json

cuBLAS with and without fast accumulation on e4m3 codes of one sign and of both; errors in units of 2^-13 S beside the bound
of each claim (reference.oracle.products). Exit code 1 where fp8_promoted does not hold without fast accumulation, or
fp8_unpromoted not with it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from moeproof.harness.reports import results
from moeproof.reference.contract import FORMATS, Claims
from moeproof.reference.oracle.codes import round_values, store
from moeproof.reference.oracle.products import U_FP8, Operand, product

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 7168)
ROWS = 128
CLAIMS = {False: "fp8_promoted", True: "fp8_unpromoted"}


def measure(length: int, same_sign: bool, fast: bool, device: str) -> dict[str, object]:
    """Largest error of one product of 128 x `length` by 128 x `length` codes, float32 out."""
    fmt, draw = FORMATS["e4m3fn"], torch.Generator().manual_seed(length)
    x, w = (torch.randn(ROWS, length, generator=draw).double() * 60 for _ in range(2))
    x, w = (round_values(t.abs() if same_sign else t, fmt) for t in (x, w))
    one = torch.ones((), device=device)
    a, b = (store(t, fmt).to(device) for t in (x, w))
    got = torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=fast).double().cpu()
    exact, error = product(Operand(x, fmt), Operand(w, fmt), FORMATS["bf16"], Claims(accumulate=CLAIMS[fast]))
    off, S = (got - exact).abs(), x.abs() @ w.abs().T
    return {
        "K": length,
        "same_sign": same_sign,
        "fast_accum": fast,
        "error_over_vS": round(float((off / (U_FP8 * S)).max()), 4),
        "relative_bias": float(((got - exact) / S).mean()),
        "claim": CLAIMS[fast],
        "observed_over_allowed": round(float((off / error).max()), 4),
    }


def main(output: Path, device: str) -> int:
    rows = [measure(k, same, fast, device) for k in LENGTHS for same in (True, False) for fast in (False, True)]
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
    results.write(output, results.origin(device, output) | {"rows": rows})
    return int(any(float(row["observed_over_allowed"]) > 1 for row in rows))  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "cuda"))
