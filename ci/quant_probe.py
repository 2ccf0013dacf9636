"""Time every tile that the fused quantised layers may use, product by product, at work points of `moeproof bench` (NVIDIA GPU).

    PYTHONPATH=src python ci/quant_probe.py RESULTS.json [--scheme fp8_block ..] [--jobs 30] [--seconds 140]

A layer is the sum of its kernels, and GEMM1 and GEMM2 choose their tiles apart (but for the height): this needs far fewer
launches than a search over whole layers, and says which formulation wins. Each tile's result is compared with float32 products
of decoded values on sampled rows before its time counts. Codes are random; a kernel's time does not depend on a quantiser.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from moeproof.harness.reports import results
from moeproof.harness.timing.points import SIZES
from moeproof.optimized import specialised_gemm
from moeproof.optimized.align import Alignment, align
from moeproof.optimized.combine import combine
from moeproof.optimized.quant import fused_gemm, packed_gemm
from moeproof.optimized.quant.fused_gemm import down, gate_up_act, requantises
from moeproof.optimized.quant.rows import code_rows, quantise_rows
from moeproof.optimized.quant.search import SHORT, strips, tiles
from moeproof.optimized.quant.vector import vector_down, vector_gate_up_act
from moeproof.optimized.slots import Slots
from moeproof.optimized.sort_rows import sort_rows
from moeproof.optimized.tiles import Tile
from moeproof.optimized.vector import Strip
from moeproof.reference.contract import SCHEMES, Activation
from moeproof.reference.contract.schemes import Quantiser

Tensor = torch.Tensor
E4M3, BF16, SILU, MXFP4 = torch.float8_e4m3fn, torch.bfloat16, Activation(), "mxfp4_w4a16"
MANY = {"dsv3full": (4096, 256, 16384, 16)}
GROUPS = (1, 4, 16)
"""Heights of a group of row blocks, tried with each point's best tile."""


@dataclass(frozen=True)
class Weights:
    w1: tuple[Tensor, Tensor]
    w2: tuple[Tensor, Tensor]


def codes(*shape: int) -> Tensor:
    return (torch.randn(shape, device="cuda", dtype=BF16) * 32).clamp(-448, 448).to(E4M3)


def operand(scheme: str, side: str, *shape: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows (side a1 or a2) or weights (side w), about unit variance over the root of a row's length."""
    q = getattr(SCHEMES[scheme], side)
    if scheme == MXFP4:
        code = torch.randint(0, 256, q.code_shape(*shape), dtype=torch.uint8, device="cuda")
        return code, torch.randint(118, 122, q.scale_shape(*shape), dtype=torch.uint8, device="cuda")
    scale = torch.rand(q.scale_shape(*shape), device="cuda") + 0.5
    made = torch.cat([codes(1, *shape[1:]) for _ in range(shape[0])]) if len(shape) == 3 else codes(*shape)
    return made, scale / 32 / (math.sqrt(shape[-1]) if side == "w" else 1.0)


def weights(model: str, scheme: str, experts: int | None = None) -> Weights:
    E, _, H, I = SIZES[model]  # noqa: E741
    e = experts or E
    return Weights(operand(scheme, "w", e, 2 * I, H), operand(scheme, "w", e, H, I))


def decoded(scheme: str, side: str, code: Tensor, scale: Tensor | None) -> Tensor:
    """float32 (R, C) of one matrix."""
    q = getattr(SCHEMES[scheme], side)
    if q is None or scale is None:
        return code.float()
    if scheme == MXFP4:
        both = torch.stack([code & 15, code >> 4], dim=-1).flatten(-2)
        table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=code.device)
        values = table[(both & 7).long()] * torch.where(both > 7, -1.0, 1.0)
        return values * torch.exp2(scale.float() - 127).repeat_interleave(32, -1)
    for dim, size in enumerate(q.group):
        if size > 1:
            scale = scale.repeat_interleave(size, dim).narrow(dim, 0, code.size(dim))
    return code.float() * scale


def sort(ids: Tensor, e: int, block_m: int) -> Alignment:
    """What `align` makes, by torch: its kernels would be compiled for every size."""
    flat = ids.flatten().long()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=e)
    padded = (counts + block_m - 1) // block_m * block_m
    end, begin = padded.cumsum(0), counts.cumsum(0) - counts
    B = (flat.numel() + min(flat.numel(), e) * (block_m - 1)) // block_m
    slots = torch.full((B * block_m,), flat.numel(), dtype=torch.int32, device=ids.device)
    expert = flat[order]
    slots[(end - padded)[expert] + torch.arange(flat.numel(), device=ids.device) - begin[expert]] = order.int()
    blocks = torch.searchsorted(end, torch.arange(B, device=ids.device) * block_m, right=True).int()
    return Alignment(slots, torch.where(blocks < e, blocks, -1), end[-1:].int(), counts.int(), block_m)


Rows = tuple[Tensor, Tensor | None]


class Point:
    """One model, scheme and number of tokens: rows, ids, and the kernels on them."""

    def __init__(self, model: str, scheme: str, M: int, w: Weights) -> None:
        _, K, self.H, self.I = SIZES[model]
        self.model, self.scheme, self.M, self.w, self.e = model, scheme, M, w, w.w1[0].size(0)
        self.K = min(K, self.e)
        self.ids = [torch.rand(M, self.e, device="cuda").topk(self.K).indices.int() for _ in range(4 if M <= 256 else 2)]
        self.x: Rows = self.rows("a1", M, self.H)
        self.y = torch.empty(M * self.K, self.H, device="cuda", dtype=BF16)
        self.sorted: dict[int, list[Alignment]] = {}
        self.hidden: dict[int, list[Rows]] = {}

    def rows(self, side: str, R: int, C: int) -> Rows:
        if self.scheme != MXFP4:
            return operand(self.scheme, side, R, C)
        return torch.randn(R, packed_gemm.room(1, C, self.ids[0]).size(1), device="cuda", dtype=BF16), None

    def alignments(self, block_m: int) -> list[Alignment]:
        if block_m not in self.sorted:
            self.sorted[block_m] = [sort(ids, self.e, block_m) for ids in self.ids]
        return self.sorted[block_m]

    def first(self, tile: Tile) -> list[Callable[[], Tensor]]:
        found = []
        for a in self.alignments(tile.block_m):
            P = a.sorted_slots.numel()
            h: Rows = torch.empty(P, self.I, device="cuda", dtype=BF16), None
            if self.scheme == MXFP4:
                h = packed_gemm.room(P, self.I, self.y), None
            elif requantises(tile, SILU, a2(self.scheme).group[1]):
                h = code_rows(a2(self.scheme), P, self.I, a.sorted_slots.device)
            found.append(functools.partial(self.run_first, a, h, tile))
        self.last = a, h
        return found

    def run_first(self, a: Alignment, h: Rows, tile: Tile) -> Tensor:
        short = tile.block_m <= SHORT  # as the tables have it
        if self.scheme == MXFP4:
            packed_gemm.gate_up_act(self.x[0], self.w.w1, h[0], a, tile, (2 * self.I, self.H), self.K, SILU, None, short)
        elif tile.roles:
            codes, scale = self.x
            assert scale is not None
            x = sort_rows(codes, a, self.K), scale
            specialised_gemm.gate_up_act(x, self.w.w1, h, a, tile, self.K, self.M * self.K, SILU, BF16)
        else:
            gate_up_act(self.x, self.w.w1, h, a, tile, self.K, SILU, BF16, None, short)  # type: ignore[arg-type]
        return h[0]

    def second(self, tile: Tile) -> list[Callable[[], Tensor]]:
        found = []
        for a in self.alignments(tile.block_m):
            if len(self.hidden.setdefault(tile.block_m, [])) == len(found):
                self.hidden[tile.block_m].append(self.rows("a2", a.sorted_slots.numel(), self.I))
            h = self.hidden[tile.block_m][len(found)]
            found.append(functools.partial(self.run_second, a, h, tile))
        self.last = a, h
        return found

    def run_second(self, a: Alignment, h: Rows, tile: Tile) -> Tensor:
        short = tile.block_m <= SHORT
        if self.scheme == MXFP4:
            packed_gemm.down(h[0], self.w.w2, self.y, a, tile, self.I, None, None, short)
        elif tile.roles:
            specialised_gemm.down(h, self.w.w2, self.y, a, tile)  # type: ignore[arg-type]
        else:
            down(h, self.w.w2, self.y, a, tile, None, None, short)  # type: ignore[arg-type]
        return self.y

    def row(self, side: str, rows: Rows, place: int, columns: int) -> Tensor:
        """float32 (1, columns), in order."""
        value = decoded(self.scheme, side, rows[0][place : place + 1], None if rows[1] is None else rows[1][place : place + 1])
        return value[:, place_of(columns)] if self.scheme == MXFP4 else value

    def error(self, product: str, call: Callable[[], Tensor]) -> float:
        """Relative error of sampled rows of the last call's result."""
        a, h = self.last
        positions = (a.sorted_slots < self.M * self.K).nonzero().flatten()
        some = positions[torch.linspace(0, positions.numel() - 1, 4, device="cuda").long()]
        if product == "first":
            h[0].view(torch.uint8).fill_(127)
        else:
            self.y.fill_(float("nan"))
        call()
        got, want = [], []
        for position in some.tolist():
            slot, expert = int(a.sorted_slots[position]), int(a.block_expert[position // a.block_m])
            w = self.w.w1 if product == "first" else self.w.w2
            matrix = decoded(self.scheme, "w", w[0][expert], w[1][expert])
            if product == "first":
                gate, up = (self.row("a1", self.x, slot // self.K, self.H) @ matrix.T).chunk(2, dim=-1)
                want.append(torch.nn.functional.silu(gate) * up)
                got.append(self.row("a2", h, position, self.I))
            else:
                want.append(self.row("a2", h, position, self.I) @ matrix.T)
                got.append(self.y[slot : slot + 1].float())
        g, v = torch.cat(got), torch.cat(want)
        return float((g - v).norm() / v.norm())


def place_of(columns: int) -> Tensor:
    """Where each column lies in a permuted row."""
    c = torch.arange(columns)
    return c // 128 * 128 + c % 8 * 16 + c % 128 // 8


def a2(scheme: str) -> Quantiser:
    q = SCHEMES[scheme].a2
    assert q is not None
    return q


def kernels() -> dict[int, object]:
    """Every kernel of a product that was loaded so far."""
    functions = (fused_gemm._fused_scaled, packed_gemm._fused_packed, specialised_gemm._specialised)
    return {id(k): k for f in functions for caches in f.device_caches.values() for k in caches[0].values()}


def kernel_of(before: dict[int, object]) -> tuple[int, int]:
    """(registers, spilled bytes) of the kernel that was loaded since, or (0, 0)."""
    for key, kernel in kernels().items():
        if key not in before:
            return kernel.n_regs, kernel.n_spills  # type: ignore[attr-defined]
    return 0, 0


def limit(product: str, tile: Tile, scheme: str) -> float:
    """bf16 results, requantised ones, and sums of 13 fraction bits."""
    if product == "first" and requantises(tile, SILU, 128 if scheme == "fp8_block" else 0):
        return 0.04
    return 0.02 if tile.fast else 0.006


def run_rest(model: str, scheme: str, M: int) -> None:
    """What a layer launches beside its products, at its real sizes: compiled for whoever times layers next."""
    E, K, H, I = SIZES[model]  # noqa: E741
    x = torch.zeros(M, H, device="cuda", dtype=BF16)
    slots = Slots(torch.arange(K, device="cuda", dtype=torch.int32).repeat(M, 1), E, E)
    if scheme == MXFP4:
        packed_gemm.permute(x, M * K / E < 48, first=False)
    for height, least, most in ((16, 0, 24), (32, 8, 48), (64, 20, 140), (128, 48, 1e9)):
        if least <= M * K / E <= most:
            overlap = height <= SHORT
            a = align(slots, height, overlap)
            if scheme != MXFP4:
                quantise_rows(x, a2(scheme), overlap=overlap, first=True)
                h = torch.zeros(a.sorted_slots.numel(), I, device="cuda", dtype=BF16)
                quantise_rows(h, a2(scheme), a.num_padded, overlap)
            y = torch.zeros(M * K, H, device="cuda", dtype=BF16)
            combine(y, torch.ones(M, K, device="cuda"), slots, x, overlap=overlap)


def compile_some(tasks: list[tuple[str, str, str, str]]) -> list[str]:
    failed = []
    for model, scheme, product, text in tasks:
        try:
            if product == "rest":
                run_rest(model, scheme, int(text))
                torch.cuda.empty_cache()
                continue
            w = weights(model, scheme, 2)
            if text.startswith("v"):
                Token(model, scheme, w, 2).call(product, Strip.parse(text.split()[0]), text.endswith("overlap"))()
            else:
                getattr(Point(model, scheme, 16, w), product)(Tile.parse(text))[0]()
            torch.cuda.synchronize()
        except Exception as error:
            failed.append(f"{scheme} {product} {text}: {type(error).__name__} {str(error)[:160]}")
            if "CUDA error" in str(error):
                break
    return failed


def timed(calls: list[Callable[[], Tensor]], seconds: float = 0.006) -> float:
    """Microseconds of a call, from replays of a graph. Captured without torch's wrapper, which collects garbage first: that
    takes longer than the replays."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        kept = [call() for call in calls]
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    graph.replay()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < 1e6 * seconds and len(times) < 12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times) / len(kept)


def try_tiles(point: Point, product: str, bad: set[str], out: list[dict[str, object]], deadline: float) -> None:
    head = {"model": point.model, "scheme": point.scheme, "M": point.M, "product": product}
    rows = point.M * point.K / point.e
    best, found = float("inf"), None
    for tile in tiles(point.scheme, product):
        if f"{point.scheme} {product} {tile}" in bad or time.monotonic() > deadline:
            continue
        least, most = {16: (0, 24), 32: (8, 48), 64: (20, 140), 128: (48, math.inf), 256: (300, math.inf)}[tile.block_m]
        if not least <= rows <= most:
            continue
        before = kernels()
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


class Token:
    """One token of a model: whole layers but for the router, and their two products alone, on 8 sets of ids."""

    def __init__(self, model: str, scheme: str, w: Weights, sets: int = 8) -> None:
        E, self.K, H, self.I = SIZES[model]
        self.scheme, self.w, e, K = scheme, w, w.w1[0].size(0), self.K
        self.x = torch.randn(1, H, device="cuda", dtype=BF16)
        self.routed, self.out = torch.rand(1, K, device="cuda"), torch.empty(1, H, device="cuda", dtype=BF16)
        # A compiling process has a few experts only; the kernel is that of all of them.
        ids = [torch.rand(1, max(e, K), device="cuda").topk(K).indices.int() % e for _ in range(sets)]
        self.slots = [Slots(one, E, E) for one in ids]
        self.xq, self.hq = operand(scheme, "a1", 1, H), operand(scheme, "a2", K, self.I)

    def layer(self, slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        q = a2(self.scheme)
        xq = quantise_rows(self.x, q, overlap=overlap, first=True)
        h = torch.empty(self.K, self.I, device="cuda", dtype=BF16)
        vector_gate_up_act(xq, self.w.w1, h, slots, strip, SILU, None, overlap)
        hq = quantise_rows(h, q, overlap=overlap)
        vector_down(hq, self.w.w2, self.out, self.routed, slots, strip, None, 1.0, overlap)
        return self.out

    def first(self, slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        h = torch.empty(self.K, self.I, device="cuda", dtype=BF16)
        vector_gate_up_act(self.xq, self.w.w1, h, slots, strip, SILU, None, overlap)
        return h

    def second(self, slots: Slots, strip: Strip, overlap: bool) -> Tensor:
        vector_down(self.hq, self.w.w2, self.out, self.routed, slots, strip, None, 1.0, overlap)
        return self.out

    def call(self, product: str, strip: Strip, overlap: bool) -> Callable[[], Tensor]:
        return functools.partial(getattr(self, product), self.slots[0], strip, overlap)

    def time(self, product: str, strip: Strip, overlap: bool) -> float:
        return timed([functools.partial(getattr(self, product), s, strip, overlap) for s in self.slots], 0.004)


def try_strips(model: str, scheme: str, w: Weights, out: list[dict[str, object]]) -> None:
    token = Token(model, scheme, w)
    for product, overlap in (("first", False), ("second", False), ("layer", True)):
        for strip in strips():
            text = f"{strip}{' overlap' if overlap else ''}"
            head = {"model": model, "scheme": scheme, "M": 1, "product": product, "tile": text}
            try:
                out.append({**head, "us": round(token.time(product, strip, overlap), 2)})
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


def has_strips(model: str, scheme: str) -> bool:
    return model != "dsv3full" and scheme != MXFP4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--scheme", action="append", default=[])
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--only", default="", help="only tiles with this word")
    parser.add_argument("--without", default="", help="leave out tiles with this word")
    parser.add_argument("--tokens", type=int, action="append", default=[])
    parser.add_argument("--tiles-only", action="store_true", help="without the strips of one token")
    parser.add_argument("--jobs", type=int, default=30, help="processes that compile first; 0: all is compiled already")
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--seconds", type=float, default=140.0)
    options = parser.parse_args()
    start = time.monotonic()
    plan = [("qwen3", "fp8_block"), ("qwen3", "fp8_token"), ("qwen3", MXFP4), ("gptoss", MXFP4), ("mixtral", "fp8_block"),
            ("mixtral", "fp8_token"), ("dsv3ep8", "fp8_block"), ("dsv3ep8", "fp8_token"), ("gptoss", "fp8_token"),
            ("dsv3full", "fp8_block")]  # fmt: skip
    plan = [(model, scheme) for model, scheme in plan if not options.scheme or scheme in options.scheme]
    plan = [(model, scheme) for model, scheme in plan if not options.model or model in options.model]
    compiled = [("qwen3", scheme) for scheme in dict.fromkeys(s for _, s in plan)]
    compiled += [("gptoss", scheme) for model, scheme in plan if model == "gptoss"]
    tasks = [(m, s, p, str(t)) for m, s in compiled for p in ("first", "second") for t in tiles(s, p)]
    left_out = {t for *_, t in tasks if options.only not in t or (options.without and options.without in t)}
    bad = {f"{s} {p} {t}" for _, s, p, t in tasks if t in left_out}
    tasks = [task for task in tasks if " ".join(task[1:]) not in bad]
    stripped = [] if options.tiles_only else [(m, s) for m, s in plan if has_strips(m, s)]
    tasks += [(m, s, "layer", f"{t}{o}") for m, s in stripped for t in strips() for o in ("", " overlap")]
    tasks += [(m, s, "rest", str(M)) for m, s in plan for M in (16, 64, 256, 1024, 4096, 16384)]
    context = multiprocessing.get_context("spawn")
    if options.jobs:
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            for failed in pool.map(compile_some, [tasks[i :: options.jobs] for i in range(options.jobs)]):
                for line in failed:
                    print("cannot run", line, flush=True)
                    bad.add(line.split(":")[0])
        print(f"{len(tasks)} kernels compiled, {time.monotonic() - start:.0f} s", flush=True)
    if options.compile_only:
        return
    found: list[dict[str, object]] = []
    for place, (model, scheme) in enumerate(plan):
        end = start + options.seconds
        deadline = time.monotonic() + (end - time.monotonic()) / (len(plan) - place)
        torch.cuda.empty_cache()
        w = weights(model, scheme)
        before = len(found)
        if (model, scheme) in stripped:
            try_strips(model, scheme, w, found)
        for M in MANY.get(model, (64, 16, 256, 1024) if scheme == MXFP4 else (4096, 1024, 256, 16384, 64, 16)):
            if options.tokens and M not in options.tokens:
                continue
            point = Point(model, scheme, M, w)
            for product in ("first", "second"):
                try_tiles(point, product, bad, found, deadline)
            torch.cuda.empty_cache()
        show(found[before:])
        results.write(options.output, results.origin("cuda", options.output) | {"found": found})
    wrong = [f for f in found if not has_time(f)]
    for f in wrong[:30]:
        print("bad:", f, flush=True)
    print(f"{len(found)} timings, {len(wrong)} bad, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
