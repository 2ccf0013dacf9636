"""How hardware adds up products, as data: what a candidate may claim where, and the constants of the bounds.

A tensor core aligns the accumulator and the products of one step to the largest exponent among them, drops what lies below
`fraction` bits, adds exactly, and truncates once more. Source of the fractions: microsoft/MMA-Sim (arXiv 2511.10909) as
collected in docs/tolerances.md section 5; a row is `measured` once a run on that hardware is committed under docs/results.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorCore:
    arch: str
    operands: str
    fraction: int | None
    """Fraction bits kept below a step's largest exponent; None where sums are exact (int32)."""
    step: int
    """Products added at a time."""
    claim: str
    """What a kernel claims (Claims.accumulate) when it adds everything in this core."""
    measured: str = ""
    """File under docs/results that shows it on the hardware, empty where the constant is a simulator's."""


TENSOR_CORES = (
    TensorCore("sm_80", "bf16, fp16", 24, 8, "fp32"),
    TensorCore("sm_80", "int8", None, 32, "fp32"),
    TensorCore("sm_89", "fp8", 13, 32, "fp8_unpromoted"),
    TensorCore("sm_90", "bf16, fp16", 25, 16, "fp32", "accumulators-h100.json"),
    TensorCore("sm_90", "fp8", 13, 32, "fp8_unpromoted", "accumulators-h100.json"),
    TensorCore("sm_90", "int8", None, 32, "fp32"),
    TensorCore("sm_100", "bf16, fp16", 25, 16, "fp32"),
    TensorCore("sm_100", "fp8, e2m1 block-scaled", 35, 64, "fp32"),
)
PROMOTED = 128
"""Terms after which a kernel that claims fp8_promoted moves its partial sum to float32 registers."""
FP8_FRACTION = min(c.fraction for c in TENSOR_CORES if c.fraction is not None)


def claim_on(arch: str, operands: str, promoted: bool = False) -> str:
    """Claims.accumulate of a kernel that multiplies such operands on this architecture. fp32 where no row says otherwise.

    `claim_on("sm_90", "fp8", promoted=True)` is fp8_promoted: partial sums go to float32 every 128 terms.
    """
    for core in TENSOR_CORES:
        if core.arch == arch and operands in core.operands.split(", "):
            return "fp8_promoted" if promoted and core.claim == "fp8_unpromoted" else core.claim
    return "fp32"
