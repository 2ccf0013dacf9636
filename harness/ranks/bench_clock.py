"""Times calls on a rank so that the ranks begin together, and judges before and after: a wrong result has no time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moeproof.harness.cases.case import parse_case
from moeproof.harness.ranks.bench_calls import RAW, Calls, PairCalls
from moeproof.harness.ranks.bench_load import Load
from moeproof.harness.ranks.call import installed
from moeproof.harness.ranks.context import RankContext
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.eager.ranks_link import GroupLink

SLEEP = 100_000
"""GPU cycles, some 60 us, that a stream waits before the ranks align: meanwhile the host launches what is timed."""
LEAST, MOST = 3, 100


@dataclass(frozen=True)
class Laps:
    """One rank's microseconds, repeat by repeat."""

    dispatch: tuple[float, ...]
    combine: tuple[float, ...]
    both: tuple[float, ...]


@dataclass(frozen=True)
class Samples:
    """What one rank has to say: times, or what is wrong on it (then, or where another rank is wrong, no times)."""

    called: Laps | None = None
    """Each call from the host."""
    replayed: Laps | None = None
    """Each call as a CUDA graph of its own: what the device does, and nothing of the host."""
    findings: tuple[str, ...] = ()


Lap = Callable[[Callable[[], object]], float]
"""Microseconds of one call on this rank, from a moment at which all ranks are ready."""


def stopwatch(context: RankContext) -> Lap:
    """CPU: wall time after a barrier. GPU: events around the call on the stream, after a barrier of the devices."""
    return _events(_aligner(context)) if context.device.type == "cuda" else _wall


def _wall(call: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def _events(align: Callable[[], object]) -> Lap:
    def lap(call: Callable[[], object]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(SLEEP)
        align()
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    return lap


def _aligner(context: RankContext) -> Callable[[], object]:
    """A barrier on the stream: gloo's is one of the hosts, and its ranks leave it tens of microseconds apart."""
    flag = torch.zeros(1, device=context.device)
    if context.transport != "symm":
        return lambda: dist.all_reduce(flag)
    import torch.distributed._symmetric_memory as symmetric

    buffer = symmetric.empty(1, dtype=torch.float32, device=context.device)
    handle = symmetric.rendezvous(buffer, context.group.group_name)

    def align(_alive: torch.Tensor = buffer) -> None:  # the barrier's flags lie in the buffer's allocation
        handle.barrier()

    return align


def time_pair(context: RankContext, candidate: str | RankPair, line: str, seconds: float) -> Samples:
    """prepare and finalize of a candidate on the case of this line, for about `seconds`."""
    pair = installed(candidate) if isinstance(candidate, str) else candidate
    calls = PairCalls(context, pair, Load(parse_case(line), context.device))
    return _timed(context, calls, seconds, pair.capturable)


def time_raw(context: RankContext, kind: str, line: str, seconds: float) -> Samples:
    """The same of a bare collective (bench_calls.RAW)."""
    return _timed(context, RAW[kind](context, Load(parse_case(line), context.device)), seconds, capturable=True)


Act = Callable[[], object]


def _timed(context: RankContext, calls: Calls, seconds: float, capturable: bool) -> Samples:
    """Judge, time, judge again; then the same of the calls in graphs. All ranks take the same turns."""
    link = GroupLink(context.group, context.device)

    def everyone(number: float) -> float:
        return float(link.all_gather(torch.tensor([number], dtype=torch.float64, device=context.device)).max())

    def judged(dispatch: Act, combine: Act) -> Samples | None:
        calls.spoil()
        everyone(0)  # no rank sends before all have spoilt what they hold
        # Rows first, on all ranks: one rank's wrong rows spoil every rank's output, and combine may write over them.
        for act, look in ((dispatch, calls.wrong_rows), (combine, calls.wrong_output)):
            act()
            found = tuple(look())
            if everyone(len(found)):
                return Samples(findings=found)
            if act is dispatch:
                calls.compute()
        return None

    def timed(dispatch: Act, combine: Act, both: Act) -> Samples | Laps:
        if (wrong := judged(dispatch, combine)) is not None:
            return wrong
        lap(both)
        slowest = everyone(lap(both))
        repeats = int(min(max(seconds * 1e6 / (2 * slowest), LEAST), MOST))
        turns = [(lap(dispatch), lap(combine), lap(both)) for _ in range(repeats)]
        return judged(dispatch, combine) or Laps(*zip(*turns, strict=True))

    def both() -> None:
        calls.dispatch()
        calls.combine()

    lap = stopwatch(context)
    called = timed(calls.dispatch, calls.combine, both)
    if isinstance(called, Samples):
        return called
    if not capturable or context.device.type != "cuda":
        return Samples(called)
    replayed = timed(*(graph.replay for graph in graphs(calls, both)))
    return replayed if isinstance(replayed, Samples) else Samples(called, replayed)


def graphs(calls: Calls, both: Act) -> tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph, torch.cuda.CUDAGraph]:
    """Of dispatch, combine and both. Each has memory of its own: `calls` ends up with what the first one fills, and the
    second one takes that."""
    whole = captured(both)
    return captured(calls.dispatch), captured(calls.combine), whole


def captured(act: Act) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # What other threads do meanwhile is theirs: NCCL's watchdog asks for its events.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        act()
    return graph
