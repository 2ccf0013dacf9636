"""`moeproof tune`: searches a candidate's configurations at each work point and writes the table that its dispatcher reads.

A configuration is held against the oracle before its time counts, under every routing of the point: a table is chosen from
by sizes alone, so the best one is best in the geometric mean over routings. The search begins with what is known to be good
here and nearby, adds one configuration of each kind, and then changes one axis of the best few at a time. The last few are
timed again at rest. Kernels are compiled by a pool of processes first: they fill Triton's cache on disk, and the search
itself compiles next to nothing.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moeproof.harness import modes
from moeproof.harness.judging.memory import Poison
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.harness.timing import timer as bench_timer
from moeproof.harness.timing.bench import input_sets, out_of
from moeproof.harness.timing.inputs import Answer, answer, make_sets
from moeproof.harness.timing.points import Work
from moeproof.harness.timing.tune_table import Table, nearest
from moeproof.reference.contract.candidate import Candidate, Tuning
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

KEPT, CLOSE = 3, 1.2
"""Configurations that are searched further: at most this many, and none slower than this times the best."""
HOPELESS = 1.35
"""A single call this much slower than the best configuration's is not timed further."""
SECONDS = 0.03
"""Replays of one configuration, about."""
FINALISTS = 3
"""Configurations that are timed again: the least of many noisy times is a lucky one."""
LEAST = 4.0
"""Seconds that a search gets at least, whatever its inputs took to make."""


@dataclass
class Search:
    """What was tried at one point. `times` in microseconds, the geometric mean over `works`; `refused` says why a configuration
    has none. `final`: the best few, timed again."""

    works: tuple[Work, ...]
    times: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    final: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def best(self) -> str:
        if self.final:
            return min(self.final, key=lambda text: statistics.geometric_mean(self.final[text]))
        return min(self.times, key=self.times.__getitem__)

    @property
    def wrong(self) -> dict[str, str]:
        return {text: why for text, why in self.refused.items() if why.startswith("wrong")}

    @property
    def name(self) -> str:
        return f"{self.works[0].model} M={self.works[0].M} {'+'.join(w.routing for w in self.works)}"


Evaluate = Callable[[str], float | str]
"""Configuration -> microseconds, or the reason why it has no time."""


def search(works: tuple[Work, ...], tuning: Tuning, first: Sequence[str], evaluate: Evaluate, deadline: float) -> Search:
    """`first`, then the starts, then one axis after the other from the best few of them."""
    found = Search(works)

    def attempt(text: str) -> None:
        if text in found.times or text in found.refused or time.monotonic() > deadline:
            return
        got = evaluate(text)
        if isinstance(got, str):
            found.refused[text] = got
        else:
            found.times[text] = got

    problem = works[0].problem
    for start in [*first, *tuning.starts(problem, len(problem.local))]:
        attempt(start)
    if not found.times:
        return found
    order = sorted(found.times, key=found.times.__getitem__)
    for start in [s for s in order if found.times[s] <= CLOSE * found.times[order[0]]][:KEPT]:
        now = start
        for axis in tuning.axes:
            tried = tuning.vary(now, axis)
            for text in tried:
                attempt(text)
            now = min([now, *(t for t in tried if t in found.times)], key=lambda t: found.times[t])
    return found


class Evaluator:
    """Checks and times configurations at one point, under each of its routings."""

    def __init__(self, candidate: Candidate, works: tuple[Work, ...], device: str, refused: Mapping[str, str]) -> None:
        self.refused = refused
        self.stands = [Stand(candidate, work, device) for work in works]

    def __call__(self, text: str) -> float | str:
        if text in self.refused:
            return self.refused[text]
        times = []
        for stand in self.stands:
            got = stand.time(text)
            if isinstance(got, str):
                return got
            times.append(got)
        return statistics.geometric_mean(times)

    def again(self, text: str) -> tuple[float, ...]:
        """Microseconds under each routing, from rest."""
        return tuple(stand.again(text) for stand in self.stands)


class Stand:
    """One point under one routing."""

    def __init__(self, candidate: Candidate, work: Work, device: str) -> None:
        assert candidate.tuning is not None
        self.run, self.device = candidate.tuning.run, device
        count = input_sets(work.M) if work.M == 1 else 2 if work.M > 1024 else 4
        self.sets = make_sets(work, count, device)
        self.answer: Answer = answer(self.sets[0], candidate.claims)
        self.once = float("inf")

    def _calls(self, text: str) -> list[bench_timer.Call]:
        return [functools.partial(self._out, inputs, text) for inputs in self.sets]

    def _out(self, inputs: Inputs, text: str) -> torch.Tensor:
        return out_of(self.run(inputs, text))

    def time(self, text: str) -> float | str:
        calls = self._calls(text)
        try:
            with Poison("nan"):
                first = calls[0]()
            found = self.answer.check(first)
            if found.findings:
                return f"wrong: {found.findings[0]}"
            if self.device != "cuda":
                return bench_timer.on_cpu(calls, 1).us
            _, guess = bench_timer.once(calls[1])
            if guess > HOPELESS * self.once and guess > 500.0:
                return f"slow: {guess:.0f} us in one call"
            self.once = min(self.once, guess)
            if guess > 1000.0:
                torch.cuda.empty_cache()  # each graph has a pool of its own
            graph = bench_timer.Graph(calls)
            timing = graph.time(SECONDS, 3, 30, rest=0.0)
            if not torch.equal(graph.outputs[0], first):
                return "wrong: the replayed graph left other bits than the checked call"
            return timing.us
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # what cannot be launched is no configuration for this point
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]

    def again(self, text: str) -> float:
        if self.device == "cuda":
            torch.cuda.empty_cache()
        calls = self._calls(text)
        return (bench_timer.Graph(calls).time(SECONDS) if self.device == "cuda" else bench_timer.on_cpu(calls, 1)).us


_worker: list[Candidate] = []


def _start(spec: str, mode: str) -> None:
    modes.choose(mode)
    torch.set_num_threads(1)
    _worker[:] = load_candidates([spec])


def _blank(p: Problem, device: str) -> Inputs:
    """Zeros of the right sizes, every token in the first K experts. Made in all processes at once: no large temporaries."""
    ids = torch.arange(p.K, dtype=torch.int32, device=device).repeat(p.T, 1)
    return Inputs(
        problem=p,
        hidden_states=torch.zeros(p.T, p.H, dtype=p.fmt.dtype, device=device),
        topk_ids=ids,
        topk_weights=torch.ones(p.T, p.K, device=device),
        **_zeros("w1", p, (p.E, p.N, p.H), device),
        **_zeros("w2", p, (p.E, p.H, p.I), device),
    )


def _zeros(name: str, p: Problem, shape: tuple[int, int, int], device: str) -> dict[str, torch.Tensor]:
    """Weights, and their scales where they are quantised."""
    q = p.quant.w
    if q is None:
        return {name: torch.zeros(shape, dtype=p.fmt.dtype, device=device)}
    scale = torch.zeros(q.scale_shape(*shape), dtype=q.scale_format(p.fmt).dtype, device=device)
    return {name: torch.zeros(q.code_shape(*shape), dtype=q.format.dtype, device=device), f"{name}_scale": scale}


def _compile(work: Work, texts: Sequence[str], device: str) -> dict[str, str]:
    """Launch each configuration once on a few tokens and as few experts as there are slots; configuration -> what failed."""
    tuning = _worker[0].tuning
    assert tuning is not None
    inputs = _blank(replace(work.problem, T=16, E=work.problem.K), device)
    failed: dict[str, str] = {}
    for text in texts:
        try:
            tuning.run(inputs, text)
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception as error:  # reported, and not tried again by the search
            failed[text] = f"{type(error).__name__}: {str(error)[:200]}"
            if "CUDA error" in str(error):
                break  # this process has lost its context: what follows would fail whatever it is
    torch.cuda.empty_cache()
    return failed


Point = tuple[Work, ...]
"""The routings under which one configuration has to serve: what `Work` says but for the routing is equal."""


def points(works: Sequence[Work]) -> list[Point]:
    found: dict[Work, list[Work]] = {}
    for work in works:
        found.setdefault(replace(work, routing=""), []).append(work)
    return [tuple(some) for some in found.values()]


def warm(spec: str, tuning: Tuning, wanted: Mapping[Point, Sequence[str]], jobs: int, device: str) -> dict[str, str]:
    """Compile what the search will launch, in `jobs` processes; configuration -> why it cannot run.

    `wanted` holds what is tried first at each point, which may be of another kind than its starts.
    """
    models: dict[tuple[str, str], tuple[Work, dict[str, None]]] = {}
    for (work, *_), first in wanted.items():
        texts = [*first, *tuning.compiled(work.problem, len(work.problem.local))]
        models.setdefault((work.model, work.kind), (work, {}))[1].update(dict.fromkeys(texts))
    tasks = [(work, list(texts)[share::jobs]) for work, texts in models.values() for share in range(jobs)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(spec, "device")) as pool:
        running = [pool.submit(_compile, work, texts, device) for work, texts in tasks if texts]
        return {text: why for future in running for text, why in future.result().items()}


def _effort(point: Point) -> float:
    """What a configuration costs at a point, in units of the host's time for it: about 60 ms, and ten calls on the device."""
    p = point[0].problem
    per_expert = p.N * p.H + p.H * p.I
    us = max(2.0 * p.T * p.slots * per_expert / 6e8, 2.0 * min(p.E, p.T * p.slots) * per_expert / 3e6)
    return len(point) * (1.0 + us / 6000.0)


def tune(
    spec: str,
    works: Sequence[Work],
    output: Path | None,
    device: str,
    jobs: int,
    seconds: float,
    log: Callable[[str], None],
) -> Iterator[Search]:
    """Search every point, and after each one write the table as it then is. Points already there are kept unless searched."""
    candidate = load_candidates([spec])[0]
    tuning = candidate.tuning
    check(tuning is not None, f"candidate '{candidate.name}' has nothing to tune")
    assert tuning is not None
    start = time.monotonic()
    table = Table.read(output)
    wanted = {point: _first(table, tuning, point) for point in points(works)}
    refused: dict[str, str] = {}
    if device == "cuda" and jobs > 1:
        refused = warm(spec, tuning, wanted, jobs, device)
        for text, why in refused.items():
            log(f"cannot run '{text}': {why}")
        log(f"compiled in {time.monotonic() - start:.0f} s")
    made = results.origin(device, output)
    left_to_do = sum(_effort(point) for point in wanted)
    for point in wanted:
        begin = time.monotonic()
        left = seconds - (begin - start)
        evaluate = Evaluator(candidate, point, device, refused)
        # What earlier points left over is shared by those that are left, this one's inputs included.
        deadline = max(begin + left * _effort(point) / left_to_do, time.monotonic() + LEAST)
        left_to_do -= _effort(point)
        found = search(point, tuning, _first(table, tuning, point), evaluate, deadline)
        for text in sorted(found.times, key=found.times.__getitem__)[:FINALISTS]:
            found.final[text] = evaluate.again(text)
        if found.times:
            table.set(tuning.row(point[0].problem, len(point[0].problem.local)), found.best, point, found.final[found.best])
            if output:
                table.write(output, made)
            us = " ".join(f"{t:.1f}" for t in found.final[found.best])
            log(f"{found.name}: {us} us by '{found.best}', {len(found.times)} timed, "
                f"{len(found.refused)} refused, {len(found.wrong)} wrong, {time.monotonic() - begin:.1f} s")  # fmt: skip
        yield found
        if device == "cuda":
            torch.cuda.empty_cache()


def _first(table: Table, tuning: Tuning, point: Point) -> list[str]:
    """The table's own configuration of this point, then those of points nearby."""
    problem = point[0].problem
    own = table.plans.get(tuning.row(problem, len(problem.local)), {}).get(str(point[0].M))
    return list(dict.fromkeys([*([own] if own else []), *nearest(point[0], table.measured)]))


def main(found: Iterator[Search], as_json: bool, trace: Path | None) -> int:
    """Exit code: 0 every point has a configuration and none was wrong, 1 otherwise, 3 nothing was timed."""
    searches = []
    for s in found:
        searches.append(s)
        if as_json:
            best = s.best if s.times else ""
            line = {"point": s.name, "best": best, "us": s.final.get(best), "timed": len(s.times), "refused": s.refused}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
        if trace:
            trace.parent.mkdir(parents=True, exist_ok=True)
            everything = [{"point": s.name, "times": s.times, "refused": s.refused, "final": s.final} for s in searches]
            trace.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if not any(s.times for s in searches):
        return 3
    return 1 if any(s.wrong or not s.times for s in searches) else 0
