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


SHAPES = ((1024, 4), (1024, 2), (512, 2), (512, 1), (256, 1), (128, 1))
"""(scores, warps) of a router's program that are tried."""


def routed(logits: Tensor, router: Router, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
    usual = router_module.SCORES, router_module.WARPS
    router_module.SCORES, router_module.WARPS = shape
    try:
        return route(logits, router, K, bias)[0]
    finally:
        router_module.SCORES, router_module.WARPS = usual


def sorted_by(slots: Slots, block_m: int, limit: int, overlap: bool) -> Tensor:
    """With one launch up to `limit` slots."""
    usual, align_small.SLOTS = align_small.SLOTS, limit
    try:
        return align(slots, block_m, overlap).num_padded
    finally:
        align_small.SLOTS = usual


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
    for name, limit in (("align, one launch", 8192), ("align, two launches", 0)):
        for overlap in (False, True):
            row[name + ", overlap" * overlap] = us(functools.partial(sorted_by, slots, block_m, limit, overlap))
    row["align"] = row["align, one launch" if T * K <= align_small.SLOTS else "align, two launches"]
    row["combine"] = us(functools.partial(reduced, y, weights, slots, out))
    row["combine at copy bandwidth"] = (2 * (y.numel() + out.numel()) + 8 * T * K) / (gbs * 1e3)
    row["all three"] = row["softmax"] + row["align"] + row["combine"]
    return {name: round(value, 2) for name, value in row.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?")
    options = parser.parse_args()
    gbs = bench_timer.ceilings().gbs
    rows = []
    for T in (1, 16, 64, 256, 512, 1024):
        rows.append(at(T, gbs))
        print(rows[-1], flush=True)
    if options.output:
        results.write(options.output, results.origin("cuda", options.output) | {"limit_us": LIMIT, "rows": rows})


if __name__ == "__main__":
    main()
