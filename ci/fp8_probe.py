"""Time every tile that the fused fp8 layer may use, product by product, at the work points of `moeproof bench` (NVIDIA GPU).

    PYTHONPATH=src python ci/fp8_probe.py RESULTS.json [--jobs 30] [--seconds 140]

A layer is the sum of its kernels, and GEMM1 and GEMM2 choose their tiles apart (but for the height): this needs far fewer
launches than a search over whole layers, and says which formulation wins. Each tile's result is compared with float32 products
of decoded values on sampled rows before its time counts. Codes are random; a kernel's time does not depend on a quantiser.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moeproof.harness.reports import results
from moeproof.harness.timing.points import SIZES
from moeproof.harness.timing.timer import Graph
from moeproof.optimized.align import align
from moeproof.optimized.combine import combine
from moeproof.optimized.quant import fused_gemm
from moeproof.optimized.quant.fused_gemm import down, gate_up_act, requantises
from moeproof.optimized.quant.rows import code_rows, quantise_rows
from moeproof.optimized.quant.search import strips, tiles
from moeproof.optimized.quant.vector import vector_down, vector_gate_up_act
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip
from moeproof.reference.contract import SCHEMES, Activation

Tensor = torch.Tensor
E4M3, BF16, SILU = torch.float8_e4m3fn, torch.bfloat16, Activation()
GROUPS = (1, 2, 4, 16, 32)
"""Heights of a group of row blocks, tried with each point's best tile."""


@dataclass(frozen=True)
class Weights:
    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]


def codes(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=BF16) * 32).clamp(-448, 448).to(E4M3)


def operand(scheme: str, side: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows (side a2) or weights (side w), about unit variance over the root of a row's length."""
    q = getattr(SCHEMES[scheme], side)
    scale = torch.rand(q.scale_shape(*shape), device="cuda") + 0.5
    made = torch.cat([codes(1, *shape[1:]) for _ in range(shape[0])]) if len(shape) == 3 else codes(*shape)
    return made, scale / 32 / (math.sqrt(shape[-1]) if side == "w" else 1.0)


def weights(model: str, scheme: str, experts: int | None = None) -> Weights:
    E, _, H, I = SIZES[model]  # noqa: E741
    e = experts or E
    return Weights(operand(scheme, "w", e, 2 * I, H), operand(scheme, "w", e, H, I))


def decoded(scheme: str, side: str, code: Tensor, scale: Tensor) -> Tensor:
    """float32 (R, C) of one matrix."""
    q = getattr(SCHEMES[scheme], side)
    for dim, size in enumerate(q.group):
        if size > 1:
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, code.size(dim))
    return code.float() * scale


class Point:
    """One model, scheme and number of tokens: rows, ids, and the kernels on them."""

    def __init__(self, model: str, scheme: str, M: int, w: Weights) -> None:
        self.E, self.K, self.H, self.I = SIZES[model]
        self.model, self.scheme, self.M, self.w = model, scheme, M, w
        sets = 4 if M <= 256 else 2
        e = w.w1[0].size(0)
        self.ids = [torch.rand(M, e, device="cuda").topk(min(self.K, e)).indices.int() for _ in range(sets)]
        self.x = operand(scheme, "a1", M, self.H)
        self.y = torch.empty(M * self.ids[0].size(1), self.H, device="cuda", dtype=BF16)

    def first(self, tile: Tile) -> list[Callable[[], Tensor]]:
        q = SCHEMES[self.scheme].a2
        assert q is not None
        calls = []
        for ids in self.ids:
            a = align(Slots(ids, self.e, self.e), tile.block_m)
            P = a.sorted_slots.numel()
            if requantises(tile, SILU, q.group[1]):
                h: tuple[Tensor, Tensor | None] = code_rows(q, P, self.I, ids.device)
            else:
                h = torch.empty(P, self.I, device="cuda", dtype=BF16), None

            def call(a=a, h=h) -> Tensor:  # type: ignore[no-untyped-def]
                gate_up_act(self.x, self.w.w1, h, a, tile, self.ids[0].size(1), SILU, BF16)
                return h[0]

            calls.append(call)
            self.last = (a, h, ids)
        return calls

    @property
    def e(self) -> int:
        return self.w.w1[0].size(0)

    def second(self, tile: Tile) -> list[Callable[[], Tensor]]:
        calls = []
        for ids in self.ids:
            a = align(Slots(ids, self.e, self.e), tile.block_m)
            hq = operand(self.scheme, "a2", a.sorted_slots.numel(), self.I)

            def call(a=a, hq=hq) -> Tensor:  # type: ignore[no-untyped-def]
                down(hq, self.w.w2, self.y, a, tile)
                return self.y

            calls.append(call)
            self.last = (a, hq, ids)
        return calls

    def error(self, product: str, call: Callable[[], Tensor]) -> float:
        """Relative error of sampled rows of the last call's result."""
        a, h, ids = self.last
        positions = (a.sorted_slots < ids.numel()).nonzero().flatten()
        some = positions[torch.linspace(0, positions.numel() - 1, 12, device="cuda").long()]
        if product == "first":
            h[0].view(torch.uint8).fill_(127)
        else:
            self.y.fill_(float("nan"))
        call()
        got, want = [], []
        for position in some.tolist():
            slot = int(a.sorted_slots[position])
            expert = int(a.block_expert[position // a.block_m])
            if product == "first":
                w = decoded(self.scheme, "w", self.w.w1[0][expert], self.w.w1[1][expert])
                token = slot // ids.size(1)
                row = decoded(self.scheme, "a1", self.x[0][token : token + 1], self.x[1][token : token + 1])
                gate, up = (row @ w.T).chunk(2, dim=-1)
                want.append(torch.nn.functional.silu(gate) * up)
                out = h[0][position : position + 1]
                got.append(out.float() if h[1] is None else decoded(self.scheme, "a2", out, h[1][position : position + 1]))
            else:
                w = decoded(self.scheme, "w", self.w.w2[0][expert], self.w.w2[1][expert])
                want.append(decoded(self.scheme, "a2", h[0][position : position + 1], h[1][position : position + 1]) @ w.T)
                got.append(self.y[slot : slot + 1].float())
        g, v = torch.cat(got), torch.cat(want)
        return float((g - v).norm() / v.norm())


def kernel_of(before: set[int]) -> tuple[int, int]:
    """(registers, spilled bytes) of the kernel that was compiled since, or (0, 0)."""
    for caches in fused_gemm._fused_scaled.device_caches.values():
        for kernel in caches[0].values():
            if id(kernel) not in before:
                return kernel.n_regs, kernel.n_spills
    return 0, 0


def known_kernels() -> set[int]:
    return {id(k) for caches in fused_gemm._fused_scaled.device_caches.values() for k in caches[0].values()}


def limit(product: str, tile: Tile, scheme: str) -> float:
    """bf16 results, requantised ones, and sums of 13 fraction bits."""
    if product == "first" and requantises(tile, SILU, 128 if scheme == "fp8_block" else 0):
        return 0.04
    return 0.02 if tile.fast else 0.006


def compile_some(tasks: list[tuple[str, str, str, str]]) -> list[str]:
    failed = []
    for model, scheme, product, text in tasks:
        try:
            point = Point(model, scheme, 16, weights(model, scheme, 2))
            getattr(point, product)(Tile.parse(text))[0]()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{scheme} {product} {text}: {type(error).__name__} {str(error)[:160]}")
            if "CUDA error" in str(error):
                break
    return failed


def timed(calls: list[Callable[[], Tensor]], seconds: float = 0.012) -> float:
    return Graph(calls).time(seconds, 3, 12, rest=0.0).us


def try_tiles(point: Point, product: str, bad: set[str], out: list[dict[str, object]], deadline: float) -> None:
    head = {"model": point.model, "scheme": point.scheme, "M": point.M, "product": product}
    rows = point.M * point.ids[0].size(1) / point.e
    best, found = float("inf"), None
    for tile in tiles(point.scheme, product):
        if f"{point.scheme} {product} {tile}" in bad or time.monotonic() > deadline:
            continue
        if (tile.block_m > 16 and tile.block_m > 4 * rows) or (tile.block_m < 64 and rows > 2.5 * tile.block_m):
            continue
        before = known_kernels()
        try:
            calls = getattr(point, product)(tile)
            error = point.error(product, calls[-1])
            regs, spills = kernel_of(before)
            us = timed(calls) if error < limit(product, tile, point.scheme) else math.nan
        except Exception as failure:
            out.append({**head, "tile": str(tile), "failed": f"{type(failure).__name__}: {str(failure)[:120]}"})
            continue
        out.append({**head, "tile": str(tile), "us": round(us, 2), "error": round(error, 5), "regs": regs, "spills": spills})
        if us < best:
            best, found = us, tile
    if found is not None:
        for group in GROUPS:
            tile = replace(found, group_m=group)
            if tile != found and time.monotonic() < deadline:
                us = timed(getattr(point, product)(tile))
                out.append({**head, "tile": str(tile), "us": round(us, 2), "group": True})


def try_rest(point: Point, out: list[dict[str, object]]) -> None:
    """Everything beside the products: quantisers, sort, combine."""
    q = SCHEMES[point.scheme].a2
    assert q is not None
    T, K = point.ids[0].shape
    x = torch.randn(T, point.H, device="cuda", dtype=BF16)
    out_TH, routed = torch.empty_like(x), torch.rand(T, K, device="cuda")
    block_m = 16 if T * K / point.e <= 24 else 128
    slots = [Slots(ids, point.e, point.e) for ids in point.ids]
    a = align(slots[0], block_m)
    h = torch.randn(a.sorted_slots.numel(), point.I, device="cuda", dtype=BF16)
    parts: dict[str, Callable[[], object]] = {
        "quant1": lambda: quantise_rows(x, q)[0],
        "align": lambda: align(slots[0], block_m).num_padded,
        "quant2": lambda: quantise_rows(h, q, a.num_padded)[0],
        "combine": lambda: combine(point.y, routed, slots[0], out_TH),
    }
    line = {"model": point.model, "scheme": point.scheme, "M": point.M}
    for name, call in parts.items():
        out.append({**line, "product": name, "us": round(timed([call] * 4), 2)})  # type: ignore[list-item]


def try_strips(model: str, scheme: str, w: Weights, out: list[dict[str, object]]) -> None:
    """One token, whole layers but for the router; 8 sets of ids."""
    E, K, H, I = SIZES[model]  # noqa: E741
    q = SCHEMES[scheme].a1
    assert q is not None
    x = torch.randn(1, H, device="cuda", dtype=BF16)
    routed, result = torch.rand(1, K, device="cuda"), torch.empty(1, H, device="cuda", dtype=BF16)
    sets = [Slots(torch.rand(1, E, device="cuda").topk(K).indices.int(), E, E) for _ in range(8)]
    xq, h = quantise_rows(x, q), torch.empty(K, I, device="cuda", dtype=BF16)
    hq = quantise_rows(h.fill_(0.5), q)

    def layer(slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        xq = quantise_rows(x, q, overlap=overlap, first=True)
        h = torch.empty(K, I, device="cuda", dtype=BF16)
        vector_gate_up_act(xq, w.w1, h, slots, strip, SILU, None, overlap)
        vector_down(quantise_rows(h, q, overlap=overlap), w.w2, result, routed, slots, strip, None, 1.0, overlap)
        return result

    def first(slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        vector_gate_up_act(xq, w.w1, h, slots, strip, SILU)
        return h

    def second(slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        vector_down(hq, w.w2, result, routed, slots, strip)
        return result

    for name, call, overlap in (
        ("layer", layer, True), ("layer", layer, False), ("first", first, False), ("second", second, False)
    ):  # fmt: skip
        for strip in strips():
            text = f"{strip}{' overlap' if overlap else ''}"
            head = {"model": model, "scheme": scheme, "M": 1, "product": name, "tile": text}
            try:
                us = timed([functools.partial(call, s, strip, overlap) for s in sets], 0.003)
                out.append({**head, "us": round(us, 2)})
            except Exception as failure:
                out.append({**head, "failed": f"{type(failure).__name__}: {str(failure)[:120]}"})


def show(found: list[dict[str, object]]) -> None:
    """The best four of each product at each point."""
    rows: dict[tuple[object, ...], list[dict[str, object]]] = {}
    for f in found:
        rows.setdefault((f["model"], f["scheme"], f["M"], f["product"]), []).append(f)
    for key, own in rows.items():
        good = sorted((f for f in own if has_time(f)), key=lambda f: float(str(f["us"])))
        text = "  ".join(f"{f['us']}={f.get('tile', '')}" for f in good[:4])
        print(*key, f"({len(good)} timed, {len(own) - len(good)} bad):", text, flush=True)


def has_time(f: dict[str, object]) -> bool:
    return "us" in f and f["us"] == f["us"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--jobs", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=140.0)
    options = parser.parse_args()
    start = time.monotonic()
    plan = [("qwen3", "fp8_block"), ("qwen3", "fp8_token"), ("mixtral", "fp8_block"), ("mixtral", "fp8_token"),
            ("dsv3ep8", "fp8_block"), ("dsv3ep8", "fp8_token"), ("gptoss", "fp8_token"), ("dsv3full", "fp8_block")]  # fmt: skip
    compiled = (("qwen3", "fp8_block"), ("qwen3", "fp8_token"), ("gptoss", "fp8_token"))
    tasks = [(m, s, p, str(t)) for m, s in compiled for p in ("first", "second") for t in tiles(s, p)]
    context = multiprocessing.get_context("spawn")
    bad: set[str] = set()
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for failed in pool.map(compile_some, [tasks[i :: options.jobs] for i in range(options.jobs)]):
            for line in failed:
                print("cannot run", line, flush=True)
                bad.add(line.split(":")[0])
    print(f"{len(tasks)} kernels compiled, {time.monotonic() - start:.0f} s", flush=True)
    found: list[dict[str, object]] = []
    for place, (model, scheme) in enumerate(plan):
        end = start + options.seconds
        deadline = time.monotonic() + (end - time.monotonic()) / (len(plan) - place)
        torch.cuda.empty_cache()
        w = weights(model, scheme)
        before = len(found)
        if model != "dsv3full":
            try_strips(model, scheme, w, found)
        for M in (4096, 64, 1024, 16, 16384, 256):
            point = Point(model, scheme, M, w)
            for product in ("first", "second"):
                try_tiles(point, product, bad, found, deadline)
            try_rest(point, found)
            torch.cuda.empty_cache()
        show(found[before:])
        results.write(options.output, results.origin("cuda", options.output) | {"found": found})
    wrong = [f for f in found if not has_time(f)]
    for f in wrong[:30]:
        print("bad:", f, flush=True)
    print(f"{len(found)} timings, {len(wrong)} bad, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
