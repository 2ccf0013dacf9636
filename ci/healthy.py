"""Healthy campaign: the installed candidates over many cases, in which any alarm is a false one. Adds to one results file.

    python ci/healthy.py docs/results/healthy-cpu.json --parts cover random quantised --cases 8000 --candidates torch
    python ci/healthy.py docs/results/healthy-h100.json --parts compiled --cases 8000 --mode device --jobs 16 --seconds 150
    python ci/healthy.py docs/results/healthy-cpu.json --merge elsewhere.json ..

Parts: `cover` every pair of values of two axes, streams and graphs where there is a GPU, and several ranks, simulated ones on
the CPU; `sweep` every 16-bit gate and every code; `random` and `quantised` as many random cases as --cases says, `compiled` as
many of a few layers, for which few kernels are compiled, `aligned` of those that library products and fused kernels can do;
`histories` side stream and CUDA-graph replay (GPU); `huge` offsets beyond 2^31 elements (GPU, 60 GB, a minute; give it
--jobs 1). --candidates takes names, and `torch`, `triton` and `cuda` for all of a kind. A stage check is one tensor of one
case judged against its bound.

Pieces go to the processes as these get free, and the file is written every 20 seconds: a run that ends early loses at most
that, and the same command goes on from there. Records of other machines are added by --merge. Exit code 0 when nothing alarmed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from moeproof.harness import modes, workers
from moeproof.harness.cases.axes import covering
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.compiled_sample import RUN, aligned_case, compiled_case
from moeproof.harness.cases.quant_sample import draw_quantised
from moeproof.harness.cases.sample import draw
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.judging import campaign
from moeproof.harness.judging.campaign import Piece, Record
from moeproof.harness.judging.judge import judge
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.registry import find_candidates, find_rank_pairs, load_candidates
from moeproof.harness.reports import results
from moeproof.harness.verdict import Verdict
from moeproof.reference.contract.candidate import Candidate, RankPair
from moeproof.reference.contract.errors import ContractError, check

HUGE = (
    "T=5,H=512,I=256,E=3,K=2,huge=1,seed=1",
    "T=33,H=128,I=64,E=8,K=2,dtype=fp16,huge=1,values=tagged,seed=2",
    "T=3,H=256,I=128,E=2,K=1,huge=1,values=int,layout=batched,seed=3",
)
KINDS = ("torch", "triton", "cuda")
WRITE_SECONDS = 20
PATIENCE = 600.0
"""Seconds for a case on simulated ranks: slow is no alarm here."""
STARTS = 3
"""Sets of processes, where one dies."""


def histories() -> list[Case]:
    """The quick tier and both layouts of a larger layer, on a side stream and in a captured graph."""
    larger = [parse_case(f"T=64,H=512,I=256,E=16,K=4,layout={layout},seed=7") for layout in ("standard", "batched")]
    return [replace(case, history=history) for case in [*cases_of("quick"), *larger] for history in ("stream", "graph")]


ENDLESS: dict[str, Callable[[int], Case]] = {
    "random": draw,
    "quantised": draw_quantised,
    "compiled": compiled_case,
    "aligned": aligned_case,
}
LISTED: dict[str, Callable[[], Sequence[Case]]] = {
    "cover": covering,
    "sweep": lambda: cases_of("sweep"),
    "histories": histories,
    "huge": lambda: [parse_case(line) for line in HUGE],
}
PARTS = (*ENDLESS, *LISTED)


@functools.cache
def listed(part: str) -> Sequence[Case]:
    return LISTED[part]()


def case_of(part: str, number: int) -> Case:
    return ENDLESS[part](number) if part in ENDLESS else listed(part)[number]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=["cover", "sweep", "random", "quantised"])
    parser.add_argument("--cases", type=int, default=1000, help="of each part without an end")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--mode", default="auto", choices=modes.MODES)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--candidates", nargs="+", default=list(KINDS), help="names, or torch, triton, cuda")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no piece after this long")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], help="only add these records to the output")
    options = parser.parse_args()
    try:
        record = recorded(options)
    except ContractError as error:
        print(f"healthy: {error}", file=sys.stderr)
        return 2
    campaign.write(options.output, record)
    print("\n".join([*record.alarm_texts, f"{record.checks.total()} stage checks, {record.alarms} alarms"]))
    return 1 if record.alarms else 0


def recorded(options: argparse.Namespace) -> Record:
    """The output's record with what was asked for added to it."""
    before = campaign.read(options.output) if options.output.exists() else None
    if options.merge:
        found = [campaign.read(path) for path in options.merge]
        record = before or Record(found[0].mode)
        for other in found:
            record.merge(other)
        return record
    mode = workers.settle(options.mode)
    record = before or Record(mode)
    check(record.mode == mode, f"'{options.output}' is of mode {record.mode}, and this run of mode {mode}: name another file")
    check(bool(chosen(options.candidates)), "no candidate of these kinds is installed")
    run(record, work(record, options), mode, options)
    return record


def work(record: Record, options: argparse.Namespace) -> Iterator[Piece]:
    """What the record does not hold yet, in pieces of RUN cases."""
    planned = []
    for part in options.parts:
        first, end = (options.start, options.start + options.cases) if part in ENDLESS else (0, len(listed(part)))
        planned += record.missing(Piece(part, " ".join(options.candidates), first, end), RUN)
    return iter(planned)


def run(record: Record, queue: Iterator[Piece], mode: str, options: argparse.Namespace) -> None:
    """Judge the pieces in processes and add them to the record, which is written now and then."""
    begun = written = time.perf_counter()
    this = results.origin(modes.default_device(), options.output) | {"jobs": options.jobs}
    record.runs.append(this)
    before = record.checks.total()
    for found in _judged(queue, mode, options, begun):
        record.merge(found)
        now = time.perf_counter()
        made = record.checks.total() - before
        this |= {"stage_checks": made, "seconds": round(now - begun, 1)}
        if now - written > WRITE_SECONDS:
            campaign.write(options.output, record)
            written = now
            print(f"{now - begun:.0f} s: {made} stage checks, {record.alarms} alarms", flush=True)


def _judged(queue: Iterator[Piece], mode: str, options: argparse.Namespace, begun: float) -> Iterator[Record]:
    """Records of pieces as they come. Few are begun ahead: what has to wait when time is up is left for the next run.

    A process that dies takes the others with it: that is an alarm, and new ones go on with what had to wait.
    """
    context = multiprocessing.get_context("spawn")  # a process in which Triton is not yet imported
    waiting: dict[Future[Record], Piece] = {}
    for _ in range(STARTS):
        queue, waiting = itertools.chain(waiting.values(), queue), {}
        with ProcessPoolExecutor(
            options.jobs, mp_context=context, initializer=_start, initargs=(mode, options.candidates)
        ) as pool:
            try:
                while True:
                    while len(waiting) < options.jobs + 2 and time.perf_counter() - begun < options.seconds:
                        if (piece := next(queue, None)) is None:
                            break
                        cases = [case_of(piece.part, number) for number in range(piece.first, piece.end)]
                        waiting[pool.submit(_judge_piece, piece, cases, mode)] = piece
                    if not waiting:
                        return
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del waiting[future]
            except BrokenProcessPool:
                died = Record(mode)
                died.add_alarm(f"a process died while it judged one of {[tuple(piece) for piece in waiting.values()]}")
                yield died


def chosen(names: Sequence[str]) -> list[Candidate]:
    """Candidates by name, and all of a kind. Raises ContractError where there are none of a name."""
    installed = find_candidates()
    kinds = [c for name in names if name in KINDS for c in installed if c.backend == name]
    return [*kinds, *load_candidates([name for name in names if name not in KINDS])]


def simulated(names: Sequence[str]) -> list[RankPair]:
    """What runs on simulated ranks, of the named kinds."""
    return [pair for pair in find_rank_pairs() if pair.backend in names and "simulated" in pair.transports]


_candidates: list[Candidate] = []
_pairs: list[RankPair] = []
"""Of this worker process."""


def _start(mode: str, names: list[str]) -> None:
    workers.settle(mode)
    _candidates[:] = chosen(names)
    _pairs[:] = simulated(names)


def _judge(thing: Candidate | RankPair, case: Case) -> Verdict:
    if isinstance(thing, RankPair):
        return RankSession(case.ranks, "simulated", PATIENCE).judge(thing.name, thing, case)
    return judge(thing, case)


_lost: list[Piece] = []
"""Where this process lost its GPU: after a failed assertion on the device nothing works any more."""


def _judge_piece(piece: Piece, cases: list[Case], mode: str) -> Record:
    """The record of one piece. What the harness itself raises is an alarm: no healthy case may make it."""
    if _lost:
        os._exit(1)
    record = Record(mode)
    for case in cases:
        for candidate in _candidates if case.ranks == 1 else _pairs:
            try:
                record.add_verdict(_judge(candidate, case))
            except Exception:
                last = traceback.format_exc(limit=-3)
                record.add_alarm(f'the harness raised on {candidate.name}, "{case}"\n{last}')
            if record.alarms and not _gpu_works():
                _lost.append(piece)
                return Record(mode, alarms=record.alarms, alarm_texts=record.alarm_texts)
    record.finish(piece)
    return record


def _gpu_works() -> bool:
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except Exception:  # sticky: whatever it is, the process is of no more use
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
