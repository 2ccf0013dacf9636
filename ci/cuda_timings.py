"""Each CUDA stage's time beside its Triton twin's, in CUDA graphs: python ci/cuda_timings.py (an NVIDIA GPU with nvcc).

Bytes count each element once. A fraction is of what a device copy of 2 GiB reaches on the same card, in the same process.
"""

from __future__ import annotations

import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from moeproof.optimized.cuda.quantise import quantise
from moeproof.optimized.cuda.stages import CUDA, TRITON, Stages
from moeproof.optimized.quant import quantise as triton
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, Router
from moeproof.reference.contract.schemes import Quantiser

SIZES = (1024, 16384, 1, 16, 64, 256, 4096)
E, K, H, I = 128, 8, 2048, 768  # noqa: E741  (the project's letter)
"""The sizes of qwen3-30b-a3b."""
ROUTER = Router.parse("softmax:renorm=sum")
CALLS, REPLAYS = 20, 9


def _seconds(call: Callable[[], object]) -> float:
    """Median time of `call` on the device."""
    times = []
    for _ in range(2 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def graph_us(call: Callable[[], object]) -> float:
    """Microseconds of one call, from replays of a graph that holds CALLS of them."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return _seconds(graph.replay) * 1e6 / CALLS


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy of 2 GiB."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / _seconds(lambda: y.copy_(x))


def calls(T: int) -> tuple[Callable[[Stages], dict[str, Callable[[], object]]], dict[str, int]]:
    """(a function that gives a set of stages its calls on T tokens, bytes that each memory-bound stage must move)."""
    logits = torch.randn(T, E, device="cuda")
    ids, weights = CUDA.route(logits, ROUTER, K)
    slots = Slots(ids, E, E)
    block_m = rows_per_block(slots.count, E)
    gate_up, y = (torch.randn(T * K, width, device="cuda").to(torch.bfloat16) for width in (2 * I, H))
    h, out = (torch.empty(rows, width, device="cuda", dtype=torch.bfloat16) for rows, width in ((T * K, I), (T, H)))

    def of(s: Stages) -> dict[str, Callable[[], object]]:
        return {
            "router": lambda: s.route(logits, ROUTER, K),
            "align": lambda: s.align(slots, block_m),
            "router + align": lambda: s.align(Slots(s.route(logits, ROUTER, K)[0], E, E), block_m),
            "act": lambda: s.act(gate_up, h, Activation(), slots=slots),
            "combine": lambda: s.combine(y, weights, slots, out),
        }

    return of, {"act": 2 * (gate_up.numel() + h.numel()), "combine": 2 * (y.numel() + out.numel()) + 8 * T * K}


def quantisers(T: int) -> dict[str, tuple[Callable[[], object], Callable[[], object], int]]:
    """(call, its Triton twin, bytes it must move) of QUANT1 on (T, H), and of ACT with QUANT2 on (T * K, 2 I)."""
    x = torch.randn(T, H, device="cuda").to(torch.bfloat16)
    gate_up = torch.randn(T * K, 2 * I, device="cuda").to(torch.bfloat16)
    found: dict[str, tuple[Callable[[], object], Callable[[], object], int]] = {}
    for name in ("fp8_token", "fp8_block", "int8_token", "mxfp8", "mxfp4_w4a4"):
        q = SCHEMES[name].a1
        assert q is not None

        def size(rows: int, columns: int, q: Quantiser = q) -> int:
            """Bytes of codes and scales."""
            scale = 1 if q.scale == "e8m0" else 4
            return rows * (columns // q.format.per_byte + scale * q.groups(columns))

        both = (functools.partial(of, x, q, FORMATS["bf16"]) for of in (quantise, triton.quantise))
        found[f"quantise {name}"] = *both, 2 * x.numel() + size(T, H)
        both = (functools.partial(of, gate_up, q, FORMATS["bf16"], act=Activation()) for of in (quantise, triton.quantise))
        found[f"act + quantise {name}"] = *both, 2 * gate_up.numel() + size(T * K, I)
    return found


def timings(bandwidth: float, until: float = math.inf) -> Iterator[dict[str, object]]:
    """A row for each stage and size, the sizes with a target first; none begins after `until` (of time.monotonic)."""
    for T in SIZES:
        if time.monotonic() > until:
            return
        of, moved = calls(T)
        cuda, triton = of(CUDA), of(TRITON)
        for stage in cuda:
            us = graph_us(cuda[stage])
            row: dict[str, object] = {
                "stage": stage,
                "M": T,
                "us": round(us, 2),
                "triton_us": round(graph_us(triton[stage]), 2),
            }
            if stage in moved:
                row["fraction_of_copy"] = round(moved[stage] / us * 1e6 / bandwidth, 3)
            yield row
        if T not in (16, 1024, 16384):
            continue
        for name, (ours, twin, size) in quantisers(T).items():
            us, triton_us = graph_us(ours), graph_us(twin)
            fraction = round(size / us * 1e6 / bandwidth, 3)
            yield {"stage": name, "M": T, "us": round(us, 2), "triton_us": round(triton_us, 2), "fraction_of_copy": fraction}


if __name__ == "__main__":
    rate = copy_bandwidth()
    print(json.dumps({"copy_bytes_per_second": round(rate)}))
    for line in timings(rate):
        print(json.dumps(line))
