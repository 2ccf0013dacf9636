"""Timing on a GPU: calls captured in one CUDA graph and replayed, eager launches apart, and the card's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
REST = 0.05
"""Seconds without work before a burst of replays."""
Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, least and most over the replays."""

    us: float
    us_min: float
    us_max: float
    replays: int


@dataclass(frozen=True)
class Ceilings:
    """What this card did in this run: a large product, and a large copy counting bytes read and written."""

    tflops: float
    gbs: float
    fp8_tflops: float = float("nan")
    """Of e4m3 products with scales of rows and columns; NaN where the GPU has none."""


def _timing(samples: Sequence[float]) -> Timing:
    return Timing(statistics.median(samples), min(samples), max(samples), len(samples))


class Graph:
    """Several calls, one for each set of inputs, captured in one CUDA graph. `outputs` hold what the last replay made."""

    def __init__(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            calls[0]()  # compiled kernels are loaded here: loading is not allowed under capture
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = [call() for call in calls]

    def time(self, seconds: float, least: int = 3, most: int = 9, rest: float = REST) -> Timing:
        """Replays for about `seconds`, each timed by events, after one untimed.

        A short burst on a card at rest, as the stored peers were timed: at the power limit an H100 lowers its clock, and a
        long series of one candidate would be held against a short one of another.
        """
        torch.cuda.synchronize()
        time.sleep(rest)
        self.graph.replay()
        samples = [self._replay()]
        replays = int(min(max(seconds * 1e6 / max(samples[0] * len(self.outputs), 1.0), least), most))
        samples += [self._replay() for _ in range(replays - 1)]
        return _timing(samples)

    def _replay(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / len(self.outputs)


def once(call: Call) -> tuple[Tensor, float]:
    """(output, microseconds between events around one eager call): a first guess, launch gaps included."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    out = call()
    end.record()
    end.synchronize()
    return out, 1e3 * start.elapsed_time(end)


def eager(calls: Sequence[Call], repeats: int = 3) -> tuple[float, float]:
    """Microseconds a call of (host time until it returns, wall time until the device is done), medians over the repeats."""
    host, wall = [], []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        wall.append(time.perf_counter() - start)
    return tuple(1e6 * statistics.median(s) / len(calls) for s in (host, wall))  # type: ignore[return-value]


def on_cpu(calls: Sequence[Call], repeats: int = 3) -> Timing:
    """Wall time of eager calls on a CPU."""
    calls[0]()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append(1e6 * (time.perf_counter() - start) / len(calls))
    return _timing(samples)


def kernels(call: Call) -> dict[str, float]:
    """Device microseconds of each kernel of one call, by name, in the order of first launch."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as found:
        call()
        torch.cuda.synchronize()
    times: dict[str, float] = {}
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    for event in sorted(events, key=lambda e: e.time_range.start):
        times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us()
    return times


def ceilings() -> Ceilings:
    """bf16 8192^3 products in a graph, and eager copies of 1 GiB. Best of several, as a ceiling should be."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = Graph([lambda: a @ b] * 4).time(0.1, most=12)
    fp8 = _fp8_product(n)
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = min(once(lambda: target.copy_(source))[1] for _ in range(12))
    return Ceilings(2.0 * n**3 / (product.us_min * 1e6), 2.0 * source.numel() / (copy * 1e3), 2.0 * n**3 / (fp8 * 1e6))


def _fp8_product(n: int) -> float:
    """Microseconds of one n^3 product of e4m3 codes; NaN where this torch or GPU has none."""
    if torch.cuda.get_device_capability() < (8, 9):
        return float("nan")
    a, b = (torch.randn(n, n, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    rows, columns = torch.ones(n, 1, device="cuda"), torch.ones(1, n, device="cuda")

    def call() -> Tensor:
        return torch._scaled_mm(a, b.T, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True)

    return Graph([call] * 4).time(0.1, most=12).us_min
