"""Each CUDA stage's time beside its Triton twin's and the fastest peer's, in CUDA graphs: python ci/cuda_timings.py (one H100).

Bytes count each element once. A fraction is of what a device copy of 2 GiB reaches on the same card, in the same process.
With a results file that holds a part `timings` the page docs/cuda.md is written of it anew, and no GPU is asked:

    python ci/cuda_timings.py docs/results/cuda-h100.json
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moeproof.optimized import dispatch as triton_dispatch
from moeproof.optimized.cuda import dispatch
from moeproof.optimized.cuda.quantise import quantise
from moeproof.optimized.cuda.stages import CUDA, TRITON, Stages
from moeproof.optimized.quant import quantise as triton
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, Router
from moeproof.reference.contract.schemes import Quantiser

Row = dict[str, object]
SIZES = (16384, 1024, 16, 1, 128, 4096)
E, K, H, I = 128, 8, 2048, 768  # noqa: E741  (the project's letter)
"""The sizes of qwen3-30b-a3b."""
ROUTER = Router.parse("softmax:renorm=sum")
QUANTISED = ("fp8_token", "fp8_block", "int8_token", "mxfp8", "mxfp4_w4a4")
CALLS, REPLAYS = 20, 9
PEERS: dict[tuple[str, int], tuple[float, str]] = {
    ("align", 16): (4.7, "vLLM"),
    ("router + align", 16): (11.9, "triton_kernels"),
    ("act", 16): (1.8, "vLLM"),
    ("combine", 16): (2.4, "vLLM"),
    ("align", 4096): (13.0, "counting sort of the DeepGEMM pipeline"),
    ("router + align", 4096): (15.0, "triton_kernels"),
    ("act", 4096): (45.0, "vLLM"),
    ("combine", 4096): (52.0, "vLLM"),
    ("quantise fp8_token", 4096): (9.0, "vLLM"),
    ("quantise fp8_block", 4096): (9.5, "vLLM"),
    ("act + quantise fp8_token", 4096): (44.0, "torch scaled_mm pipeline"),
    ("act + quantise fp8_block", 4096): (43.0, "vLLM"),
}
"""Microseconds of the fastest peer on an H100 80GB HBM3 at these sizes, bf16 rows: kernel times of the profiler, without what
lies between launches (vLLM 0.33.0 and the triton_kernels and DeepGEMM 2.8.1 that it vendors, torch 2.11.0; 2026-11-23)."""


@dataclass(frozen=True)
class Stage:
    """A stage on tensors of one size."""

    name: str
    cuda: Callable[[], object]
    triton: Callable[[], object]
    bytes: int | None = None
    """That it must move, where that bounds it."""


def seconds(call: Callable[[], object]) -> float:
    """Median time of `call` on the device, which is kept busy until all is queued: the host's own time stays out of it."""
    times = []
    for _ in range(2 + REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(400_000)
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
    return seconds(graph.replay) * 1e6 / CALLS


def copy_bandwidth() -> float:
    """Bytes read and written a second by a device copy of 2 GiB."""
    x = torch.randn(2**29, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * x.element_size() / seconds(lambda: y.copy_(x))


def plain(T: int) -> Iterator[Stage]:
    """Those of a bf16 layer on T tokens."""
    logits = torch.randn(T, E, device="cuda")
    ids, weights = CUDA.route(logits, ROUTER, K)
    slots = Slots(ids, E, E)
    block_m = rows_per_block(slots.count, E)
    x, gate_up, y = (
        torch.randn(n, width, device="cuda").to(torch.bfloat16) for n, width in ((T, H), (T * K, 2 * I), (T * K, H))
    )
    h, out = (torch.empty(rows, width, device="cuda", dtype=torch.bfloat16) for rows, width in ((T * K, I), (T, H)))

    def calls(s: Stages) -> dict[str, Callable[[], object]]:
        move = dispatch.move_rows if s is CUDA else triton_dispatch.move_rows
        return {
            "router": lambda: s.route(logits, ROUTER, K),
            "align": lambda: s.align(slots, block_m),
            "router + align": lambda: s.align(Slots(s.route(logits, ROUTER, K)[0], E, E), block_m),
            "dispatch": lambda: move(x, y, K),
            "act": lambda: s.act(gate_up, h, Activation(), slots=slots),
            "combine": lambda: s.combine(y, weights, slots, out),
        }

    bound = {
        "dispatch": 2 * (x.numel() + y.numel()),
        "act": 2 * (gate_up.numel() + h.numel()),
        "combine": 2 * (y.numel() + out.numel()) + 8 * T * K,
    }
    of, twin = calls(CUDA), calls(TRITON)
    for name in of:
        yield Stage(name, of[name], twin[name], bound.get(name))


def quantised(T: int) -> Iterator[Stage]:
    """QUANT1 on (T, H), and ACT with QUANT2 on (T * K, 2 I)."""
    x = torch.randn(T, H, device="cuda").to(torch.bfloat16)
    gate_up = torch.randn(T * K, 2 * I, device="cuda").to(torch.bfloat16)
    for name in QUANTISED:
        q = SCHEMES[name].a1
        assert q is not None
        one, two = (functools.partial(f, x, q, FORMATS["bf16"]) for f in (quantise, triton.quantise))
        yield Stage(f"quantise {name}", one, two, 2 * x.numel() + _code_bytes(q, T, H))
        one, two = (functools.partial(f, gate_up, q, FORMATS["bf16"], act=Activation()) for f in (quantise, triton.quantise))
        yield Stage(f"act + quantise {name}", one, two, 2 * gate_up.numel() + _code_bytes(q, T * K, I))


def _code_bytes(q: Quantiser, rows: int, columns: int) -> int:
    """Of codes and scales."""
    return rows * (columns // q.format.per_byte + (1 if q.scale == "e8m0" else 4) * q.groups(columns))


def timings(bandwidth: float, until: float = math.inf) -> Iterator[Row]:
    """A row for each stage and size, the sizes with a target first; none begins after `until` (of time.monotonic)."""
    for T in SIZES:
        for kind in (plain, quantised):
            for stage in kind(T):
                if time.monotonic() > until:
                    return
                yield timed(stage, T, bandwidth)


def timed(stage: Stage, T: int, bandwidth: float) -> Row:
    us = graph_us(stage.cuda)
    row: Row = {"stage": stage.name, "M": T, "us": round(us, 2), "triton_us": round(graph_us(stage.triton), 2)}
    if stage.bytes is not None:
        row["fraction_of_copy"] = round(stage.bytes / us * 1e6 / bandwidth, 3)
    return row


def target(row: Row) -> bool | None:
    """Does a row keep what the stages are held to? None where nothing is asked of it.

    Router and sort in 10 us up to 1024 tokens; quantisers and combine at 0.85 of the copy bandwidth at 16384.
    """
    stage, M = str(row["stage"]), row["M"]
    if stage == "router + align" and M in (1, 16, 128, 256, 1024):
        return float(str(row["us"])) <= 10.0
    if M == 16384 and (stage == "combine" or stage.startswith("quantise")):
        return float(str(row["fraction_of_copy"])) >= 0.85
    return None


PAGE = Path(__file__).resolve().parent.parent / "docs" / "cuda.md"
BEGIN, END = "<!-- timings: written by ci/cuda_timings.py -->\n", "<!-- end of timings -->\n"


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line for each stage, a column for each size; CUDA's time / Triton's / the fastest peer's."""
    sizes = sorted({int(str(row["M"])) for row in rows})
    by = {(str(row["stage"]), int(str(row["M"]))): row for row in rows}
    lines = [
        "| stage | " + " | ".join(f"M={M}" for M in sizes) + " | of copy at M=16384 |",
        "| --- |" + " ---: |" * (len(sizes) + 1),
    ]
    for stage in dict.fromkeys(name for name, _ in by):
        cells = [_cell(by.get((stage, M)), PEERS.get((stage, M))) for M in sizes]
        largest = by.get((stage, 16384), {})
        lines.append(f"| {stage} | " + " | ".join(cells) + f" | {largest.get('fraction_of_copy', '')} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None, peer: tuple[float, str] | None) -> str:
    if row is None:
        return ""
    words = f"{row['us']} / {row['triton_us']}" + (f" / {peer[0]}" if peer else "")
    return f"{words} (!)" if target(row) is False else words


def page(text: str, rows: Sequence[Row]) -> str:
    """`text` with the table of these rows between its marks."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + table(rows) + "\n" + END + rest.split(END)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="?", help="write docs/cuda.md of this file's timings")
    options = parser.parse_args()
    if options.results:
        rows = json.loads(options.results.read_text(encoding="utf-8"))["timings"]["each"]
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
        return
    rate = copy_bandwidth()
    print(json.dumps({"copy_bytes_per_second": round(rate)}))
    for row in timings(rate):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
