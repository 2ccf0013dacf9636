"""How much of the smaller of communication and computation two micro-batches hide, between real GPUs.

    python ci/rank_overlap.py [--ranks 2] [--tokens 4096 ..] [--ratio 0.5 ..] [--output docs/results/rank-overlap-h100.json]

The pair symm-standard-overlapped carries tokens, as two micro-batches of half of them; products of bf16 matrices, as wide as
an expert's second, stand for what each computes. Three CUDA graphs are timed, median of the replays: communication alone, as
fast as it can be with the whole GPU for itself; computation alone; both together, communication cut so that it leaves room.
hidden = (communication + computation - both) / the smaller, so more than 0 is faster than one after the other. Two shapes:
- `layer`: one layer as FusedMoEOverlappedKernel calls it. The first dispatch and the last combine have nothing beside them,
  so where computation takes as long as communication at most half can be hidden.
- `chain`: eight layers as engines run them, half of a micro-batch's computation before its dispatch (attention) and half
  between dispatch and combine (experts): each way has the other micro-batch's computation beside it.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness.ranks import RankContext, RankPool, command
from moeproof.harness.ranks.call import settle
from moeproof.harness.reports import results
from moeproof.reference.contract import Grid
from moeproof.reference.eager.ranks_link import GroupLink

H, K, E = 7168, 8, 64
INNER = 2048
"""The product that stands for computation is (m, INNER) x (INNER, H)."""
CHAIN = 8
REPLAYS = 8
STEP = 128
"""Rows of the product, in multiples of its tiles."""
CUTS = {
    f"{rows}/{sums} {share}": (share, rows == "copies", sums == "copies")
    for rows, sums in (("programs", "programs"), ("copies", "programs"), ("copies", "copies"))
    for share in (1 / 8, 3 / 16, 1 / 4, 3 / 8)
}
"""What carries rows and sums, programs or the copy engines, and the share of the multiprocessors that programs may take."""
Act = Callable[[], Any]


class Layers:
    """Two micro-batches of this rank's tokens, through one layer or several."""

    def __init__(self, context: RankContext, tokens: int, cut: str) -> None:
        from moeproof.optimized.symm.cuts import ALONE, beside
        from moeproof.optimized.symm.layout import Payload
        from moeproof.optimized.symm.overlapped import SymmOverlappedPrepareFinalize

        device, grid = context.device, Grid(E, context.world_size)
        self.pf = SymmOverlappedPrepareFinalize(
            GroupLink(context.group, device),
            grid,
            tokens,
            Payload(H, K, torch.bfloat16, H),
            cuts=beside(*CUTS[cut]) if cut else ALONE,
        )
        draw = torch.Generator().manual_seed(context.rank)
        ids = torch.stack([torch.randperm(E, generator=draw)[:K] for _ in range(tokens)]).int().to(device)
        x = torch.randn(tokens, H, device=device).bfloat16()
        half, self.map = tokens // 2, grid.expert_map(context.rank).to(device)  # type: ignore[union-attr]
        self.x, self.ids = x.split(half), ids.split(half)
        self.weights = torch.rand(tokens, K, device=device).split(half)
        self.out = torch.empty_like(x).split(half)
        rows = context.world_size * half
        self.y = [torch.zeros(rows, K, H, dtype=torch.bfloat16, device=device) for _ in range(2)]
        self.weight = torch.randn(INNER, H, device=device).bfloat16()

    def set_rows(self, rows: int) -> None:
        """Of each micro-batch's product."""
        self.rows = torch.randn(rows, INNER, device=self.weight.device).bfloat16()
        self.product = self.rows.new_empty(rows, H)

    def compute(self, parts: int = 1) -> None:
        rows = self.rows.size(0) // parts
        torch.mm(self.rows[:rows], self.weight, out=self.product[:rows])

    def start(self, n: int) -> Any:
        return self.pf.start_prepare(self.x[n], None, None, self.weights[n], self.ids[n], E, self.map, False)

    def experts(self, n: int, flight: Any, compute: Act) -> None:
        _, _, _, ids, weights = self.pf.finish_prepare(flight)
        compute()
        self.pf.start_finalize(flight, self.out[n], self.y[n], weights, ids, False)

    def layer(self, travel: bool, compute: Act) -> None:
        flights = [self.start(n) for n in (0, 1)] if travel else []
        for n in (0, 1):
            if travel:
                self.experts(n, flights[n], compute)
            else:
                compute()
        for flight in flights:
            self.pf.finish_finalize(flight)

    def chain(self, travel: bool, compute: Act) -> None:
        flights: list[Any] = [None, None]
        for _ in range(CHAIN):
            for n in (0, 1):
                if flights[n] is not None:
                    self.pf.finish_finalize(flights[n])
                compute()
                if travel:
                    flights[n] = self.start(n)
            for n in (0, 1):
                if travel:
                    self.experts(n, flights[n], compute)
                else:
                    compute()
        for flight in flights:
            if flight is not None:
                self.pf.finish_finalize(flight)


def clocked(context: RankContext, layers: Layers, act: Act) -> float:
    """Microseconds of a replay, the slowest rank's."""
    link = GroupLink(context.group, context.device)
    act()
    layers.pf.settle()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        act()
    graph.replay()
    layers.pf.settle()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    link.all_gather(torch.zeros(1, device=context.device))
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    layers.pf.settle()
    us = statistics.median(1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return float(link.all_gather(torch.tensor([us], dtype=torch.float64, device=context.device)).max())


SHAPES = {"layer": (1, 1), "chain": (2, CHAIN)}
"""Parts of a micro-batch's computation, and layers."""


def alone(context: RankContext, tokens: int, ratios: list[float]) -> dict[tuple[str, float], tuple[int, float, float]]:
    """(shape, ratio) -> rows of a micro-batch's product; microseconds of communication, and of computation, by itself."""
    settle(context, None)
    layers, found = Layers(context, tokens, ""), {}
    layers.set_rows(8192)
    per_row = clocked(context, layers, lambda: [layers.compute() for _ in range(4)]) / 4 / 8192
    for shape, (parts, count) in SHAPES.items():
        run = getattr(layers, shape)
        travel = clocked(context, layers, lambda run=run: run(True, lambda: None))  # type: ignore[misc]
        for ratio in ratios:
            each = ratio * travel / (2 * count) / per_row
            layers.set_rows(max(round(each / (STEP * parts)), 1) * STEP * parts)
            work = functools.partial(layers.compute, parts)
            computing = clocked(context, layers, lambda run=run, work=work: run(False, work))  # type: ignore[misc]
            found[shape, ratio] = layers.rows.size(0), travel, computing
    return found


def together(context: RankContext, tokens: int, cut: str, by_itself: dict[tuple[str, float], tuple[int, float, float]]) -> Any:
    """A reading for each shape and ratio."""
    settle(context, None)
    layers, found = Layers(context, tokens, cut), []
    for shape, (parts, _) in SHAPES.items():
        run = getattr(layers, shape)
        cut_travel = clocked(context, layers, lambda run=run: run(True, lambda: None))  # type: ignore[misc]
        for (name, ratio), (rows, travel, computing) in by_itself.items():
            if name != shape:
                continue
            layers.set_rows(rows)
            work = functools.partial(layers.compute, parts)
            both = clocked(context, layers, lambda run=run, work=work: run(True, work))  # type: ignore[misc]
            hidden = (travel + computing - both) / min(travel, computing)
            times = {"communication_us": travel, "so_cut_us": cut_travel, "computation_us": computing, "both_us": both}
            found.append(
                {"shape": shape, "T": tokens, "cut": cut, "ratio": ratio, "rows": rows}
                | {name: round(us, 1) for name, us in times.items()}
                | {"hidden": round(hidden, 3), "of_one_after_the_other": round(both / (travel + computing), 3)}
            )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--tokens", type=int, action="append", help="of a rank; 4096 and 8192 by default")
    parser.add_argument("--ratio", type=float, action="append", help="computation to communication; 0.5, 1 and 2 by default")
    parser.add_argument("--cut", action="append", choices=CUTS, help="all by default")
    parser.add_argument("--deadline", type=float, default=90.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    command.settle("symm", "auto")
    readings, failed = [], 0
    with RankPool(options.ranks, "symm", deadline=options.deadline, record=False) as pool:
        for tokens in options.tokens or (4096, 8192):
            first = pool.run(alone, tokens, options.ratio or [0.5, 1.0, 2.0])
            if not first.ok:
                failed += 1
                print(tokens, first, flush=True)
                continue
            for cut in options.cut or CUTS:
                run = pool.run(together, tokens, cut, first.results[0])
                if not run.ok:
                    failed += 1
                    print(tokens, cut, run, flush=True)
                    continue
                readings += run.results[0]
                for reading in run.results[0]:
                    print(*(f"{name}={value}" for name, value in reading.items()), flush=True)
                if options.output:
                    made = results.origin("cuda", options.output) | {"H": H, "topk": K, "experts": E, "ranks": options.ranks}
                    results.write(options.output, made | {"readings": readings})
    return 1 if failed or not readings else 0


if __name__ == "__main__":
    sys.exit(main())
