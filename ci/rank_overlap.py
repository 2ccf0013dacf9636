"""How much of the smaller of communication and computation two micro-batches hide, between real GPUs.

    python ci/rank_overlap.py [--ranks 2] [--tokens 4096 ..] [--ratio 0.5 ..] [--output docs/results/rank-overlap-h100.json]

The pair symm-standard-overlapped carries tokens, as two micro-batches of half of them; a product of bf16 matrices stands for
what each computes. Three CUDA graphs are timed, median of the replays: communication alone, computation alone (the whole GPU
is its own), both. hidden = (communication + computation - both) / the smaller. Two shapes:
- `layer`: one layer as FusedMoEOverlappedKernel calls it. The first dispatch and the last combine have nothing beside them,
  so where computation takes as long as communication at most half can be hidden.
- `chain`: four layers as engines run them, half of a micro-batch's computation before its dispatch (attention) and half
  between dispatch and combine (experts): each way has the other micro-batch's computation beside it.
"""

from __future__ import annotations

import argparse
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
N = 4096
"""Columns of the product that stands for computation: (m, H) x (H, N)."""
CHAIN = 4
REPLAYS = 8
STEP = 128
"""Rows of the product, in multiples of its tiles."""
CUTS = {f"{kind} {share}": (share, kind == "copies") for kind in ("programs", "copies") for share in (1 / 16, 1 / 8, 1 / 4)}
"""Share of the multiprocessors that an exchange may take, and whether the copy engines carry what leaves."""
Act = Callable[[], Any]


class Layers:
    """Two micro-batches of this rank's tokens, through one layer or several."""

    def __init__(self, context: RankContext, tokens: int, cut: str) -> None:
        from moeproof.optimized.symm.cuts import beside
        from moeproof.optimized.symm.layout import Payload
        from moeproof.optimized.symm.overlapped import SymmOverlappedPrepareFinalize

        device, grid = context.device, Grid(E, context.world_size)
        share, copies = CUTS[cut]
        self.pf = SymmOverlappedPrepareFinalize(
            GroupLink(context.group, device), grid, tokens, Payload(H, K, torch.bfloat16, H), cuts=beside(share, copies)
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
        self.weight = torch.randn(H, N, device=device).bfloat16()
        self.rows = torch.randn(1, H, device=device).bfloat16()

    def set_rows(self, rows: int) -> None:
        """Of each micro-batch's product."""
        self.rows = torch.randn(rows, H, device=self.weight.device).bfloat16()
        self.product = self.rows.new_empty(rows, N)

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


def measure(context: RankContext, tokens: int, cut: str, ratios: list[float]) -> list[dict[str, Any]]:
    """One reading for each shape and ratio of computation to communication."""
    settle(context, None)
    torch.backends.cuda.preferred_blas_library("cublaslt")
    layers, found = Layers(context, tokens, cut), []
    layers.set_rows(4096)
    per_row = clocked(context, layers, lambda: [layers.compute() for _ in range(4)]) / 4 / 4096
    for shape, run, parts, count in (("layer", layers.layer, 1, 1), ("chain", layers.chain, 2, CHAIN)):
        travel = clocked(context, layers, lambda run=run: run(True, lambda: None))  # type: ignore[misc]
        for ratio in ratios:
            each = ratio * travel / (2 * count) / per_row
            layers.set_rows(max(round(each / (STEP * parts)), 1) * STEP * parts)

            def work(parts: int = parts) -> None:
                layers.compute(parts)

            computing = clocked(context, layers, lambda run=run: run(False, work))  # type: ignore[misc]
            for leaving in (False, True):
                leave(int(CUTS[cut][0] * 132) if leaving else None)
                both = clocked(context, layers, lambda run=run: run(True, work))  # type: ignore[misc]
                leave(None)
                hidden = (travel + computing - both) / min(travel, computing)
                times = {"communication_us": travel, "computation_us": computing, "both_us": both}
                found.append(
                    {"shape": shape, "T": tokens, "cut": cut, "ratio": ratio, "leaving": leaving}
                    | {name: round(us, 1) for name, us in times.items()}
                    | {"hidden": round(hidden, 3)}
                )
    return found


def leave(processors: int | None) -> None:
    """Products leave so many multiprocessors to others."""
    torch._C._set_sm_carveout_experimental(processors)


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
            for cut in options.cut or CUTS:
                run = pool.run(measure, tokens, cut, options.ratio or [0.5, 1.0, 2.0])
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
