"""Measure how matrix products accumulate on this GPU, and hold the figures against the bounds of the harness.

    python ci/accumulators.py docs/results/accumulators-h100.json
    python ci/accumulators.py docs/results/accumulators-h100.json --page docs/accumulators.md

The second line needs no GPU: it makes the page of verdicts out of the file.

For each product, operand format, kind of data and length K: the largest |error| / (u S) with S = sum |a||w| and u = 2^-24
(2^-13 for fp8 operands), the same over u Q with Q^2 = sum a^2 w^2, the size of a sum of mixed signs, and over what the
product's claim allows, beside the most that this allows; the relative bias on data of one sign; and the misround rate, the
share of results that, stored in 16 bits (fp16 for fp16 operands, else bf16), are not the exact result's own rounding, beside
the share that the misrounding count expects. The reference is a float64 product of the same operands. Each class of
accumulator then gets a verdict (harness/reports/accumulators.py): what the code uses holds, and is no further from what was
measured than it should be. Exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
import triton.language as tl

from moeproof.harness.cases.generator import Stream
from moeproof.harness.judging.misround import allowance, chance, size
from moeproof.harness.reports import accumulators, results
from moeproof.harness.reports.accumulators import KINDS, LENGTHS
from moeproof.reference.contract import FORMATS, Claims, Format
from moeproof.reference.oracle import typical
from moeproof.reference.oracle.products import Operand, product
from moeproof.reference.oracle.rounding import round_to, ulp

Tensor = torch.Tensor
M, N = 256, 512
OPERANDS = {"bf16": "bf16", "fp16": "fp16", "fp8": "e4m3fn", "fp32": "fp32"}
"""Format of each kind of operand."""
CLAIMED = {
    "triton tf32": "tf32",
    "triton, default": "fp8_unpromoted",
    "triton, 128 imprecise": "fp8_promoted",
    "triton, added per 128": "fp8_promoted",
    "torch scaled, fast": "fp8_unpromoted",
    "torch scaled, slow": "fp8_promoted",
    "torch scaled, fast, stored": "fp8_unpromoted",
    "torch scaled grouped, fast, stored": "fp8_unpromoted",
    "torch scaled grouped, slow, stored": "fp8_promoted",
}
"""What a kernel with this product claims (Claims.accumulate); all others claim fp32."""


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


def scaled_grouped(fast: bool) -> Callable[[Tensor, Tensor], Tensor]:
    def run(a: Tensor, w: Tensor) -> Tensor:
        ends = torch.tensor([M], dtype=torch.int32, device="cuda")
        rows, columns = torch.ones(M, device="cuda"), torch.ones(1, N, device="cuda")
        out = torch._scaled_grouped_mm(
            a, w[None].transpose(1, 2), rows, columns, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
        return out.float()

    return run


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
            "torch scaled grouped, fast, stored": scaled_grouped(True),
            "torch scaled grouped, slow, stored": scaled_grouped(False),
        }
    plain = {"triton": triton_product(), "torch, stored": lambda a, w: (a @ w.T).float()}
    return plain | ({"torch grouped, stored": grouped} if name == "bf16" else {})


def operands(name: str, kind: str, K: int, device: str) -> tuple[Tensor, Tensor]:
    """(M, K) and (N, K), the same bytes on every machine."""
    draw = Stream(K, f"accumulators/{name}/{kind}", device)
    a, w = (draw.normal(rows, K) for rows in (M, N))
    if kind == "one sign":
        a, w = a.abs(), w.abs()
    if kind == "outlier":
        a = torch.where(draw.uniform(M, K) < 1 / 256, a * 32, a)
    dtype = FORMATS[OPERANDS[name]].dtype
    return a.float().to(dtype), w.float().to(dtype)


def narrow(name: str) -> Format:
    """What results are stored in."""
    return FORMATS["fp16" if name == "fp16" else "bf16"]


def expectation(name: str, claim: str, a: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float64 (M, N): the exact product, how far a kernel of this claim may be off it, and each element's chance to be
    rounded the wrong way: what the judge works with.
    """
    fmt, codes = FORMATS[OPERANDS[name]], name == "fp8"
    x, y = (Operand(t.double(), fmt, quantised=codes) for t in (a, w))
    dtype, claims = FORMATS["bf16"] if codes else fmt, Claims(accumulate=claim)
    exact, error = product(x, y, dtype, claims)
    expected = size(error, typical.product(x, y, dtype, claims))
    return exact, error, chance(exact, expected, ulp(exact, narrow(name)))


def measure() -> Iterator[dict[str, object]]:
    for name in OPERANDS:
        for label, run in products(name).items():
            for kind in KINDS:
                for K in LENGTHS:
                    yield _point(name, label, run, kind, K)


def _point(name: str, label: str, run: Callable[[Tensor, Tensor], Tensor], kind: str, K: int) -> dict[str, object]:
    unit = 2.0**-13 if name == "fp8" else 2.0**-24
    claim = CLAIMED.get(label, "fp32")
    row: dict[str, object] = {"operands": name, "product": label, "claim": claim, "data": kind, "K": K, "unit": unit}
    try:
        a, w = operands(name, kind, K, "cuda")
        got = run(a, w).double()
    except Exception as error:  # what this machine cannot do is a figure too
        return row | {"error": str(error).split("\n")[0][:200]}
    exact, error, chances = expectation(name, claim, a, w)
    S = a.double().abs() @ w.double().abs().T
    Q = (a.double() ** 2 @ (w.double() ** 2).T).sqrt()
    # Results stored in 16 bits carry one rounding more: it is taken off.
    half_ulp = ulp(exact, narrow(name)) / 2 if "stored" in label else torch.zeros_like(exact)
    excess = ((got - exact).abs() - half_ulp).clamp(min=0)
    wrong = int((round_to(got, narrow(name)) != round_to(exact, narrow(name))).sum())
    return row | {
        "worst_over_uS": float((excess / (unit * S)).max()),
        "worst_over_uQ": float((excess / (unit * Q)).max()),
        "used_over_uS": float((error / (unit * S)).max()),
        "observed_over_allowed": float((excess / error).max()),
        "relative_bias": float(((got - exact) / exact.abs()).mean()) if kind == "one sign" else None,
        "misrounded_16bit": wrong / exact.numel(),
        "expected_misrounded_16bit": float(chances.mean()),
        "misrounded_over_allowed": wrong / float(allowance(chances.sum())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--page", type=Path, help="only write this page out of the output, which is there already")
    options = parser.parse_args()
    if options.page is None:
        torch.backends.cuda.matmul.allow_tf32 = False
        rows = list(measure())
        shown = [row if "error" in row else row | {"verdict": accumulators.row_verdict(row)[1]} for row in rows]
        found = results.origin("cuda", options.output) | {"shape": {"M": M, "N": N}} | accumulators.as_record(rows)
        results.write(options.output, found | {"rows": shown})
    record = json.loads(options.output.read_text(encoding="utf-8"))
    text = accumulators.page(record)
    print(text)
    if options.page is not None:
        options.page.write_text(text, encoding="utf-8")
    verdicts = [*accumulators.constants(record["rows"]), *accumulators.misroundings(record["rows"])]
    return int(not accumulators.sound(verdicts))


if __name__ == "__main__":
    sys.exit(main())
