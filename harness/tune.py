"""`moeproof tune`: searches a candidate's configurations at each work point and writes the table that its dispatcher reads.

A configuration is held against the oracle before its time counts. The search starts from one configuration of each kind,
keeps the best few, and then changes one axis at a time. Kernels are compiled by a pool of processes first: they fill
Triton's cache on disk, and the search itself compiles next to nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from moeproof.harness import bench_timer, modes
from moeproof.harness.bench import input_sets, out_of
from moeproof.harness.bench_inputs import Answer, answer, make_sets
from moeproof.harness.bench_points import Work
from moeproof.harness.memory import Poison
from moeproof.harness.registry import load_candidates
from moeproof.reference.contract.candidate import Candidate, Tuning
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

KEPT, CLOSE = 3, 1.2
"""Starts that are searched further: at most this many, and none slower than this times the best."""
HOPELESS = 1.35
"""A single call this much slower than the best configuration's is not timed further."""
SECONDS = 0.03
"""Replays of one configuration, about."""


@dataclass
class Search:
    """What was tried at one point. `times` in microseconds; `refused` says why a configuration has none."""

    work: Work
    times: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> str:
        return min(self.times, key=self.times.__getitem__)

    @property
    def wrong(self) -> dict[str, str]:
        return {text: why for text, why in self.refused.items() if why.startswith("wrong")}


def search(work: Work, tuning: Tuning, evaluate: Callable[[str, float], float | str], deadline: float) -> Search:
    """`evaluate(configuration, best time so far)` gives microseconds, or the reason why it has no time."""
    found = Search(work)

    def attempt(text: str) -> None:
        if text in found.times or text in found.refused or time.monotonic() > deadline:
            return
        got = evaluate(text, min(found.times.values(), default=float("inf")))
        if isinstance(got, str):
            found.refused[text] = got
        else:
            found.times[text] = got

    for start in tuning.starts(work.problem, len(work.problem.local)):
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
    """Checks and times configurations at one point."""

    def __init__(self, candidate: Candidate, work: Work, device: str, refused: Mapping[str, str]) -> None:
        assert candidate.tuning is not None
        self.refused = refused
        self.run, self.claims, self.device = candidate.tuning.run, candidate.claims, device
        count = input_sets(work.M) if work.M == 1 else 2 if work.M > 1024 else 4
        self.sets = make_sets(work, count, device)
        self.answer: Answer = answer(self.sets[0], candidate.claims)
        self.once = float("inf")

    def __call__(self, text: str, best: float) -> float | str:
        if text in self.refused:
            return self.refused[text]
        calls = [lambda inputs=inputs: out_of(self.run(inputs, text)) for inputs in self.sets]
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
            timing = graph.time(SECONDS, 3, 30)
            if not torch.equal(graph.outputs[0], first):
                return "wrong: the replayed graph left other bits than the checked call"
            return timing.us
        except torch.OutOfMemoryError:
            return "out of memory"
        except Exception as error:  # what cannot be launched is no configuration for this point
            return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


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
        w1=torch.zeros(p.E, p.N, p.H, dtype=p.fmt.dtype, device=device),
        w2=torch.zeros(p.E, p.H, p.I, dtype=p.fmt.dtype, device=device),
    )


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


def warm(spec: str, tuning: Tuning, works: Sequence[Work], jobs: int, device: str) -> dict[str, str]:
    """Compile what the search will launch, in `jobs` processes; configuration -> why it cannot run."""
    wanted: dict[tuple[str, str], tuple[Work, dict[str, None]]] = {}
    for work in works:
        texts = tuning.compiled(work.problem, len(work.problem.local))
        wanted.setdefault((work.model, work.dtype), (work, {}))[1].update(dict.fromkeys(texts))
    tasks = [(work, list(texts)[share::jobs]) for work, texts in wanted.values() for share in range(jobs)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(spec, "device")) as pool:
        running = [pool.submit(_compile, work, texts, device) for work, texts in tasks if texts]
        return {text: why for future in running for text, why in future.result().items()}


def tune(
    spec: str, works: Sequence[Work], output: Path | None, device: str, jobs: int, seconds: float, log: Callable[[str], None]
) -> Iterator[Search]:
    """Search every point, and after each one write the table as it then is. Points already there are kept unless searched."""
    candidate = load_candidates([spec])[0]
    tuning = candidate.tuning
    check(tuning is not None, f"candidate '{candidate.name}' has nothing to tune")
    assert tuning is not None
    start = time.monotonic()
    refused: dict[str, str] = {}
    if device == "cuda" and jobs > 1:
        refused = warm(spec, tuning, works, jobs, device)
        for text, why in refused.items():
            log(f"cannot run '{text}': {why}")
        log(f"compiled in {time.monotonic() - start:.0f} s")
    made = _made(device)
    for index, work in enumerate(works):
        # What is left of the time, shared by the points that are left.
        left = seconds - (time.monotonic() - start)
        begin = time.monotonic()
        found = search(
            work, tuning, Evaluator(candidate, work, device, refused), begin + max(2.0, 3 * left / (len(works) - index))
        )
        if found.times:
            if output:
                _store(output, made, tuning.row(work.problem, len(work.problem.local)), work, found)
            log(f"{work}: {found.times[found.best]:.1f} us by '{found.best}', {len(found.times)} timed, "
                f"{len(found.refused)} refused, {len(found.wrong)} wrong, {time.monotonic() - begin:.1f} s")  # fmt: skip
        yield found
        if device == "cuda":
            torch.cuda.empty_cache()


def _made(device: str) -> dict[str, str]:
    """How the table came to be."""
    return {
        "command": "moeproof " + " ".join(sys.argv[1:]),
        "environment": modes.environment("triton", device),
        "date": time.strftime("%Y-%m-%d"),
    }


def _store(path: Path, made: dict[str, str], row: str, work: Work, found: Search) -> None:
    """Set one cell, and what it was measured at, atomically."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"plans": {}, "measured": {}}
    record["made"] = made
    tried = f"{len(found.times)} timed"
    if work.routing == "uniform" or str(work.M) not in record["plans"].get(row, {}):
        record["plans"].setdefault(row, {})[str(work.M)] = found.best
    record["measured"][str(work)] = {"us": round(found.times[found.best], 2), "plan": found.best, "tried": tried}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".part{os.getpid()}")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(found: Iterator[Search], as_json: bool, trace: Path | None) -> int:
    """Exit code: 0 every point has a configuration and none was wrong, 1 otherwise, 3 nothing was timed."""
    searches = []
    for s in found:
        searches.append(s)
        if as_json:
            best = s.best if s.times else ""
            line = {"model": s.work.model, "M": s.work.M, "routing": s.work.routing, "best": best, "us": s.times.get(best),
                    "timed": len(s.times), "refused": s.refused}  # fmt: skip
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()
        if trace:
            trace.parent.mkdir(parents=True, exist_ok=True)
            everything = [{"point": str(s.work), "times": s.times, "refused": s.refused} for s in searches]
            trace.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
    if not any(s.times for s in searches):
        return 3
    return 1 if any(s.wrong or not s.times for s in searches) else 0
