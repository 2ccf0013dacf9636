"""What the rank pool survives and what it costs: kill -9 in mid-collective again and again, hangs of each class, times.

    python ci/rank_campaign.py [--kills 50] [--ranks 2] [--transport gloo] [--output docs/results/ranks.json]

Exit code 0 where every kill ended in the right verdict, every hang ended within deadline + 2 s with its diagnosis, no
process was left over, and the case after each passed. tests/ranks/test_rank_campaign.py runs a sample of it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist

from moeproof.harness.ranks import Ending, RankContext, RankPool
from moeproof.harness.reports import results

DEADLINE = 3.0
MARGIN = 2.0


def exchange(context: RankContext, rows: int) -> bool:
    """An all-to-all of (rows, 128) to every rank, there and back."""
    mine = torch.full((rows * context.world_size, 128), float(context.rank), device=context.device)
    there, back = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_to_all_single(there, mine)
    dist.all_to_all_single(back, there)
    return bool(torch.equal(back, mine))


def exchanges_for_ever(context: RankContext, folder: str) -> None:
    """Collectives without an end: whoever is killed is killed in one, or between two. A file says that a rank has begun."""
    context.enter("DISPATCH")
    exchange(context, 64)
    (Path(folder) / str(context.rank)).touch()
    while True:
        exchange(context, 64)


def skips(context: RankContext, *_: object) -> None:
    t = torch.ones(4, device=context.device)
    dist.all_reduce(t)
    if context.rank != context.world_size - 1:
        dist.all_reduce(t)


def wrong_order(context: RankContext) -> None:
    t = torch.ones(4, device=context.device)
    if context.rank:
        dist.broadcast(t, 0)
    dist.all_reduce(t)
    if not context.rank:
        dist.broadcast(t, 0)


def other_sizes(context: RankContext) -> None:
    dist.all_reduce(torch.ones(4 + 4 * (context.rank == 1), device=context.device))


def sends_less(context: RankContext) -> None:
    n = context.world_size
    send = [2] * n
    send[-1] -= context.rank == 0
    out = torch.empty(2 * n, 3, device=context.device)
    dist.all_to_all_single(out, torch.ones(sum(send), 3, device=context.device), [2] * n, send)


def stalls(context: RankContext) -> None:
    if context.rank == 1:
        time.sleep(3600)
    dist.all_reduce(torch.ones(4, device=context.device))


HANGS: dict[str, tuple[Callable[[RankContext], None], str]] = {
    "a rank skips a collective": (skips, "calls one fewer"),
    "wrong order": (wrong_order, "another operation"),
    "different sizes": (other_sizes, "other sizes"),
    "short exchange": (sends_less, "which expects 2"),
    "a rank stalls": (stalls, "look at rank 1"),
}
"""Name -> (function, words that the diagnosis must hold)."""


def kills(pool: RankPool, count: int) -> dict[str, Any]:
    """Kill a random rank at a random moment, `count` times; what went wrong."""
    draw = random.Random(0)
    wrong: list[str] = []
    in_collective, seconds = 0, []
    for turn in range(count):
        pool.warm_up()
        pids, victim = pool.pids, draw.randrange(pool.world_size)
        killed_at: list[float] = []
        delay = 0.02 + 0.1 * draw.random()
        with tempfile.TemporaryDirectory() as folder:
            begun = Path(folder) / str(victim)

            def kill(pid: int = pids[victim], at: list[float] = killed_at, begun: Path = begun, delay: float = delay) -> None:
                limit = time.monotonic() + DEADLINE
                while not begun.exists() and time.monotonic() < limit:
                    time.sleep(0.001)
                time.sleep(delay)
                at.append(time.monotonic())
                with contextlib.suppress(ProcessLookupError):  # gone by itself: the verdict will not be the kill's
                    os.kill(pid, signal.SIGKILL)

            killer = threading.Thread(target=kill)
            killer.start()
            run = pool.run(exchanges_for_ever, folder)
            killer.join()
        seconds.append(time.monotonic() - killed_at[0])
        right = (Ending.DIED, victim, f"rank {victim} died: killed by SIGKILL in stage DISPATCH")
        if (run.ending, run.rank) != right[:2] or not run.headline.startswith(right[2]):
            wrong.append(f"kill {turn} of rank {victim}: {run}")
        in_collective += ", inside collective" in run.headline
        if left := _alive(pids):
            wrong.append(f"kill {turn}: processes {left} were left over")
        after = pool.run(exchange, 64)
        if not after.ok or after.results != (True,) * pool.world_size:
            wrong.append(f"kill {turn}: the next case did not pass: {after}")
        print(f"kill {turn}: {len(wrong)} wrong, verdict after {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
    return {
        "kills": count,
        "wrong": wrong,
        "inside_a_collective": in_collective,
        "seconds_from_kill_to_verdict": {"median": round(statistics.median(seconds), 4), "max": round(max(seconds), 4)},
    }


def hangs(pool: RankPool) -> dict[str, Any]:
    """Each class once: how it ended, after how long."""
    rows = {}
    for name, (function, words) in HANGS.items():
        pool.warm_up()
        start = time.monotonic()
        run = pool.run(function)
        seconds = time.monotonic() - start
        after = pool.run(exchange, 64)
        right = not run.ok and words in run.reason and seconds < DEADLINE + MARGIN and after.ok
        print(f"{'right' if right else 'WRONG'} {name}: {run.ending.name} after {seconds:.2f} s", file=sys.stderr, flush=True)
        rows[name] = {"right": right, "ending": run.ending.name, "seconds": round(seconds, 3), "headline": run.headline}
    return rows


def costs(pool: RankPool, cases: int, spawns: int) -> dict[str, Any]:
    """ms of a case in the warm pool, beside a new world by spawn for each case."""
    pool.warm_up()
    warm = []
    for _ in range(cases):
        start = time.perf_counter()
        pool.run(exchange, 64)
        warm.append(1e3 * (time.perf_counter() - start))
    unrecorded = []
    with RankPool(pool.world_size, pool.transport, record=False) as quiet:
        quiet.warm_up()
        for _ in range(cases):
            start = time.perf_counter()
            quiet.run(exchange, 64)
            unrecorded.append(1e3 * (time.perf_counter() - start))
    restart = []
    for _ in range(5):
        pool.kill()
        start = time.perf_counter()
        pool.warm_up()
        restart.append(1e3 * (time.perf_counter() - start))
    return {
        "warm_pool_ms": _spread(warm),
        "warm_pool_without_recording_ms": _spread(unrecorded),
        "restart_ms": _spread(restart),
        "spawn_per_case_ms": _spread([1e3 * _spawned(pool.world_size) for _ in range(spawns)]) if spawns else None,
    }


def _spawned(world_size: int) -> float:
    """Seconds of one case with processes of its own, as a test would start them."""
    import tempfile

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        ranks = [context.Process(target=_lone_rank, args=(r, world_size, folder)) for r in range(world_size)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        assert all(p.exitcode == 0 for p in ranks), "a spawned rank failed"
        return time.perf_counter() - start


def _lone_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=Path(folder, "group").as_uri(), rank=rank, world_size=world_size)
    assert exchange(RankContext(rank, world_size, torch.device("cpu"), "gloo", 0), 64)
    dist.barrier()
    dist.destroy_process_group()


def _spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"median": round(statistics.median(times), 2), "min": round(ordered[0], 2), "max": round(ordered[-1], 2)}


def _alive(pids: list[int], seconds: float = 5.0) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(Path(f"/proc/{p}").exists() for p in pids):
        time.sleep(0.01)
    return [p for p in pids if Path(f"/proc/{p}").exists()]


def campaign(ranks: int, transport: str, count: int, cases: int, spawns: int) -> dict[str, Any]:
    """All of it, as one record."""
    started = time.monotonic()
    with RankPool(ranks, transport, deadline=DEADLINE) as pool:
        record: dict[str, Any] = {
            "load_average": os.getloadavg()[0],
            "ranks": ranks,
            "transport": transport,
            "deadline_s": DEADLINE,
            "costs": costs(pool, cases, spawns),
            "hangs": hangs(pool),
            "kill_9": kills(pool, count),
        }
    return record | {"seconds": round(time.monotonic() - started, 1)}


def passed(record: dict[str, Any]) -> bool:
    return not record["kill_9"]["wrong"] and all(row["right"] for row in record["hangs"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--transport", default="gloo")
    parser.add_argument("--cases", type=int, default=50)
    parser.add_argument("--spawns", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    record = results.origin("cuda" if torch.cuda.is_available() else "cpu", options.output)
    record |= campaign(options.ranks, options.transport, options.kills, options.cases, options.spawns)
    print(json.dumps(record, indent=1))
    if options.output:
        results.write(options.output, record)
    return 0 if passed(record) else 1


if __name__ == "__main__":
    sys.exit(main())
