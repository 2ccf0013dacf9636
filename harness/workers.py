"""Runs candidates over cases in worker processes, one torch thread each."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.presets import PRESETS, preset, scaled
from moeproof.harness.cases.sample import sample
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import find_candidates, load_candidates
from moeproof.harness.verdict import Verdict
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.problem import DTYPES, LAYOUTS

TWIN_EXPERTS, TWIN_WIDTH = 8, 128
"""Size of the scaled twins that `verify` runs: all presets in both layouts within three minutes on two interpreting cores."""
Work = list[tuple[str, Case]]
"""(label, case): the label is a model's name, or empty."""


def settle(mode: str) -> str:
    """Choose the mode of this process and its threads."""
    torch.set_num_threads(1)
    return modes.choose(mode)


def plan(
    models: Sequence[str],
    lines: Sequence[str],
    tier: str,
    random: int,
    tokens: int,
    dtype: str,
    full_size: bool,
    ranks: int = 0,
) -> Work:
    """What to run: case lines, a tier, random cases, or presets in both layouts. Raises ContractError on anything malformed."""
    given = [option for option in (models, lines, tier, random) if option]
    check(len(given) <= 1, "give one of --model, --case, --tier and --random")
    check(random >= 0, f"random={random} must not be negative")
    if random:
        return [("", case) for case in sample(random)]
    if lines:
        return [("", parse_case(line)) for line in lines]
    if tier:
        return [("", case) for case in cases_of(tier)]
    known("dtype", dtype, DTYPES)
    check(tokens >= 0, f"tokens={tokens} must not be negative")
    work: Work = []
    for name in models or PRESETS:
        problem = preset(name)
        # A twin has an expert for every rank, as far as its model has.
        problem = replace(problem, T=tokens) if full_size else scaled(problem, tokens, max(TWIN_EXPERTS, ranks), TWIN_WIDTH)
        for layout in LAYOUTS:
            work.append((name, Case(replace(problem, dtype=dtype, layout=layout))))
    return work


def resolve(names: Sequence[str]) -> list[str]:
    """Names of all installed candidates, or the given ones once they are known to load."""
    if not names:
        installed = [c.name for c in find_candidates()]
        check(bool(installed), "no candidate is installed; name one as module:attribute or file.py:attribute")
        return installed
    load_candidates(names)
    return list(names)


def run(names: Sequence[str], work: Work, mode: str, jobs: int) -> Iterator[Verdict]:
    """Verdicts as they come. One process runs all candidates of a case, so that the oracle works once."""
    jobs = jobs or (1 if mode == "device" else os.cpu_count() or 1)
    if jobs == 1 or len(work) == 1:
        candidates = load_candidates(names)
        for _, case in work:
            for candidate in candidates:
                yield judge(candidate, case)
        return
    context = multiprocessing.get_context("spawn")  # a process in which Triton is not yet imported
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_start, initargs=(list(names), mode)) as pool:
        waiting: set[Future[list[Verdict]]] = {pool.submit(_judge_all, case) for _, case in work}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield from future.result()
        finally:
            for future in waiting:
                future.cancel()


_candidates: list[Candidate] = []


def _start(names: list[str], mode: str) -> None:
    settle(mode)
    _candidates[:] = load_candidates(names)


def _judge_all(case: Case) -> list[Verdict]:
    return [judge(candidate, case) for candidate in _candidates]
