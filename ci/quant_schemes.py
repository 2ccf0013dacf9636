"""Judge the quantised candidates on every scheme in both layouts: random cases and exact probes, one results file.

    python ci/quant_schemes.py docs/results/quant-campaign-interpreted.json --mode interpret [--cases 500] [--seconds 200]

Random cases have scales that differ by 8 binades and more between rows, channels, groups and experts; probes must match bit
for bit. Candidates that do a few schemes only have rows of their own: `--alone` names them. Triton's rows come first, in
turns. A results file that is there already is continued: seeds it holds are not judged again. It is written every 20 seconds,
so that a run that is ended early keeps what it has. Exit code 0 when every verdict is PASS, whatever is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch

from moeproof.harness import modes, workers
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.judging.quant_campaign import ALONE, CANDIDATES, INTERPRETED, PROBE, Key, Row, judge_piece, lost, rows
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.reference.contract import Candidate

PIECE = {"interpret": 8, "device": 125}
"""Seeds of one task: on a GPU those that share compiled kernels, which cost more than all else."""
LOSSES = 8
"""GPU faults after which a run ends."""
WRITE = 20.0
"""Seconds between two writes of the results file."""
Piece = tuple[Key, list[int]]
_loaded: dict[str, Candidate] = {}


def _start(mode: str, turns: Any) -> None:
    """In each worker: its mode, its GPU, the candidates."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent decides when to stop
    if workers.settle(mode) == "device":
        torch.cuda.set_device(turns.get())
    _loaded.update({c.name: c for c in load_candidates(CANDIDATES)})


def _judge(piece: Piece, mode: str, until: float) -> Row:
    if mode == "device" and lost():
        os._exit(1)  # the fault was counted with the seed that made it; only a new process gets the GPU back
    return judge_piece(*piece, mode, until, _loaded)


def _pool(jobs: int, mode: str) -> ProcessPoolExecutor:
    """Workers that share the GPUs evenly."""
    context = multiprocessing.get_context("spawn")  # a process in which Triton is not yet imported
    turns = context.SimpleQueue()
    for job in range(jobs):
        turns.put(job % max(torch.cuda.device_count(), 1))
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(mode, turns))


def read(path: Path) -> dict[str, Any]:
    """The results so far: the runs that made them, and rows by key."""
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"runs": [], "rows": []}
    found = [Row(**{k: v for k, v in row.items() if k != "cases"}) for row in record["rows"]]
    return {"runs": record["runs"], "rows": {row.key: row for row in found}}


def pieces(known: dict[Key, Row], keys: list[Key], first: int, end: int, mode: str) -> Iterator[Piece]:
    """What is missing, seed by seed through all rows: a run that is ended early has judged all alike."""
    size, columns = PIECE[mode], []
    for key in keys:
        seeds = [seed for seed in known[key].missing(end) if seed >= first]
        columns.append([(key, seeds[at : at + size]) for at in range(0, len(seeds), size)])
    for rank in zip_longest(*columns):
        yield from (piece for piece in rank if piece is not None)


def write(path: Path, done: dict[str, Any], run: dict[str, object]) -> tuple[int, int]:
    """Write the file; (verdicts that passed, all verdicts)."""
    found = [done["rows"][key] for key in rows("device") if key in done["rows"]]  # all there are, in their order
    passed, of = sum(row.outcomes.get("PASS", 0) for row in found), sum(row.verdicts for row in found)
    fewest = min((row.cases for row in found), default=0)
    summary = {"pass": passed, "of": of, "fewest_cases": fewest, "seconds": round(sum(row.seconds for row in found))}
    results.write(path, {**summary, "runs": [*done["runs"], run], "rows": [row.record() for row in found]})
    return passed, of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--from", dest="first", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", type=int, default=500, help=f"seeds of each scheme and layout; every {PROBE}th is a probe")
    parser.add_argument("--seconds", type=float, default=200, help="begin nothing more after this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--mode", default="auto", choices=modes.MODES)
    parser.add_argument("--again", action="store_true", help="judge rows that hold a failure from their first seed on")
    parser.add_argument("--schemes", nargs="+", default=list(QUANTISED), choices=QUANTISED)
    parser.add_argument("--alone", nargs="*", default=list(ALONE), choices=ALONE, help="candidates with rows of their own")
    options = parser.parse_args()
    begun, until = time.monotonic(), time.time() + options.seconds
    compiled = torch.cuda.is_available() and not modes.interpreting()
    mode = options.mode if options.mode != "auto" else "device" if compiled else "interpret"
    done = read(options.output)
    if options.again:
        done["rows"] = {key: row for key, row in done["rows"].items() if not row.failures}
    keys = [key for key in rows(mode) if key[0] in options.schemes and key[2] in ("", *options.alone)]
    for key in keys:
        scheme, layout, alone = key
        done["rows"].setdefault(key, Row(scheme, layout, alone=alone))
    waves = ([key for key in keys if (key[2] in ("", *INTERPRETED)) == triton] for triton in (True, False))
    run = results.origin("cuda" if mode == "device" else "cpu", options.output)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of `finally`
    todo = chain(*(pieces(done["rows"], wave, options.first, options.first + options.cases, mode) for wave in waves))
    waiting: dict[Future[Row], Piece] = {}
    written, losses = begun, 0
    pool = _pool(options.jobs, mode)
    try:
        while True:
            while len(waiting) < 2 * options.jobs and time.time() < until and losses <= LOSSES:
                piece = next(todo, None)
                if piece is None:
                    break
                waiting[pool.submit(_judge, piece, mode, until)] = piece
            if not waiting:
                break
            try:
                for future in wait(waiting, timeout=WRITE, return_when=FIRST_COMPLETED).done:
                    row = future.result()
                    del waiting[future]
                    done["rows"][row.key].add(row)
                    if row.failures:
                        print(f"{time.monotonic() - begun:.0f} s", *row.key, *row.failures, sep="\n  ", flush=True)
            except BrokenProcessPool:
                losses += 1
                todo, waiting = chain(list(waiting.values()), todo), {}
                pool = _pool(options.jobs, mode)
            if time.monotonic() - written > WRITE:
                written = time.monotonic()
                passed, of = write(options.output, done, run | {"elapsed": round(written - begun)})
                print(f"{written - begun:.0f} s: {passed} of {of} PASS", flush=True)
    finally:
        passed, of = write(options.output, done, run | {"elapsed": round(time.monotonic() - begun)})
        pool.shutdown(wait=False, cancel_futures=True)
    fewest = min(row.cases for row in done["rows"].values())
    print(f"{passed} of {of} PASS, at least {fewest} cases of each row", flush=True)
    return 0 if of and passed == of else 1


if __name__ == "__main__":
    sys.exit(main())
