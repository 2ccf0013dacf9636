"""Router, sort and reduce at qwen3's sizes, each in a CUDA graph: python ci/small_stages.py [RESULTS.json] (an NVIDIA GPU).

The sum of the three is held against 14 us; beside it stands what a copy of the reduce's bytes would take at the bandwidth this
card has in this process: no reduce over y is faster.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch

from moeproof.harness.reports import results
from moeproof.harness.timing import timer as bench_timer
from moeproof.optimized import align_small
from moeproof.optimized import router as router_module
from moeproof.optimized.align import align
from moeproof.optimized.combine import combine
from moeproof.optimized.router import route
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import Router

Tensor = torch.Tensor
E, K, H = 128, 8, 2048
LIMIT = 14.0
ROUTERS = {"softmax": "softmax:renorm=sum", "sigmoid, groups": "sigmoid:bias:groups=8/4:top2:renorm=eps/1e-20:scale=2.5"}


def us(call: bench_timer.Call) -> float:
    return bench_timer.Graph([call] * 20).time(0.02, most=20, rest=0.0).us


PARTS = (1024, 2048, 4096, 8192)
SHAPES = ((1024, 4), (512, 4), (256, 1), (128, 1))
"""(scores, warps) of a router's program that are tried."""


def routed(logits: Tensor, router: Router, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
    usual = router_module.SCORES, router_module.WARPS
    router_module.SCORES, router_module.WARPS = shape
    try:
        return route(logits, router, K, bias)[0]
    finally:
        router_module.SCORES, router_module.WARPS = usual


def sorted_by(slots: Slots, block_m: int, limit: int, part: int) -> Tensor:
    """With one launch up to `limit` slots, which counts `part` of them at once."""
    usual = align_small.SLOTS, align_small.PART
    align_small.SLOTS, align_small.PART = limit, part
    try:
        return align(slots, block_m).num_padded
    finally:
        align_small.SLOTS, align_small.PART = usual


def together(logits: Tensor, block_m: int, y: Tensor, out: Tensor) -> Tensor:
    """All three in a row, each set up while the one before it runs."""
    ids, weights = route(logits, Router.parse(ROUTERS["softmax"]), K)
    slots = Slots(ids, E, E)
    align(slots, block_m, True)
    combine(y, weights, slots, out, overlap=True)
    return out


def reduced(y: Tensor, weights: Tensor, slots: Slots, out: Tensor) -> Tensor:
    combine(y, weights, slots, out)
    return out


def at(T: int, gbs: float) -> dict[str, float]:
    """Microseconds of each stage for T tokens."""
    logits, bias = torch.randn(T, E, device="cuda"), torch.randn(E, device="cuda")
    ids, weights = route(logits, Router.parse(ROUTERS["softmax"]), K)
    y, out = (torch.randn(n, H, device="cuda").to(torch.bfloat16) for n in (T * K, T))
    slots, block_m = Slots(ids, E, E), 16 if T <= 64 else 32 if T <= 256 else 128
    row: dict[str, float] = {"T": T}
    now = router_module.SCORES, router_module.WARPS
    for name, text in ROUTERS.items():
        router = Router.parse(text)
        for shape in dict.fromkeys((now, *(SHAPES if T in (1, 64, 1024) else ()))):
            own = us(functools.partial(routed, logits, router, bias if router.bias else None, shape))
            row[name if shape == now else f"{name} {shape[0]}/{shape[1]}"] = own
    for part in PARTS:
        if part == align_small.PART or part < T * K:
            own = us(functools.partial(sorted_by, slots, block_m, 8192, part))
            row["align, one launch" if part == align_small.PART else f"align, one launch, {part} at once"] = own
    row["align, two launches"] = us(functools.partial(sorted_by, slots, block_m, 0, align_small.PART))
    row["align"] = row["align, one launch" if T * K <= align_small.SLOTS else "align, two launches"]
    row["combine"] = us(functools.partial(reduced, y, weights, slots, out))
    row["combine at copy bandwidth"] = (2 * (y.numel() + out.numel()) + 8 * T * K) / (gbs * 1e3)
    row["in a row"] = us(functools.partial(together, logits, block_m, y, out))
    row["all three"] = row["softmax"] + row["align"] + row["combine"]
    return {name: round(value, 2) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?")
    options = parser.parse_args()
    gbs = bench_timer.ceilings().gbs
    rows = []
    for T in (1024, 512, 256, 64, 16, 1):
        rows.append(at(T, gbs))
        print(rows[-1], flush=True)
    if options.output:
        results.write(options.output, results.origin("cuda", options.output) | {"limit_us": LIMIT, "rows": rows})


if __name__ == "__main__":
    main()
