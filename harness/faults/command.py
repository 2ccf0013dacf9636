"""`moeproof faults`: the catalogue against the harness."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.faults import page
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.healthy import Healthy, healthy
from moeproof.harness.faults.run import Hunt, hunts_of
from moeproof.harness.faults.side_by_side import Row, on_our_inputs, on_their_recipe
from moeproof.harness.faults.suites import SUITES

TIER = "full"


def main(classes: Sequence[str], rules: bool, output: Path | None, jobs: int, json: bool) -> int:
    """Hunt the classes (all by default); 0 where all planted ones were caught on the right stage and nothing else alarmed."""
    start = time.perf_counter()
    chosen = [by_id(name) for name in classes] or list(CATALOGUE)
    hunts: list[Hunt] = []
    theirs: list[Row] = []
    well = Healthy(0, ())
    for result in _run(chosen, not classes, rules, jobs or os.cpu_count() or 1):
        if isinstance(result, Row):
            theirs.append(result)
        elif isinstance(result, Healthy):
            well = Healthy(well.checks + result.checks, well.alarms + result.alarms)
        else:
            hunts += result
            page.line(result, json)
    hunts.sort(key=lambda h: (int(h.id[1:]), h.variant, -h.chance))
    ours: list[Row] = on_our_inputs(hunts) if rules else []
    total = page.summary(chosen, hunts, well, time.perf_counter() - start)
    page.show(chosen, hunts, well, ours, theirs, total, json)
    if output is not None:
        page.write(output, chosen, hunts, well, ours, theirs, total)
    return 0 if page.all_well(chosen, hunts, well) else 1


def _run(chosen: Sequence[Fault], with_healthy: bool, rules: bool, jobs: int) -> Iterator[list[Hunt] | Healthy | Row]:
    """Classes, slices of the healthy campaign and suites' recipes, as they end."""
    planted = [fault.id for fault in chosen if fault.planted]
    slices = range(4 * jobs) if with_healthy else range(0)
    suites = SUITES if rules else ()
    if jobs == 1 or len(planted) == 1:
        yield from map(_hunt, planted)
        yield from (_healthy((part, len(slices))) for part in slices)
        yield from map(on_their_recipe, suites)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # What fires by chance takes many calls: first, so that one worker is not left alone with it.
        order = sorted(planted, key=lambda name: not by_id(name).random)
        hunting = [pool.submit(_hunt, name) for name in order]
        checking = [pool.submit(_healthy, (part, len(slices))) for part in slices]
        judging = [pool.submit(on_their_recipe, suite) for suite in suites]
        for hunted in hunting:
            yield hunted.result()
        for checked in checking:
            yield checked.result()
        for suite_row in judging:
            yield suite_row.result()


def _hunt(name: str) -> list[Hunt]:
    fault = by_id(name)
    # Chance needs repeats, and those are made on the few cases of the quick tier.
    return hunts_of(fault, cases_of("quick" if fault.random else TIER))


def _healthy(part: tuple[int, int]) -> Healthy:
    number, count = part
    return healthy(cases_of(TIER)[number::count])
