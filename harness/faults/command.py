"""`moeproof faults`: the catalogue against the harness."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.faults import nulls, page
from moeproof.harness.faults.campaign import Campaign
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.chance import median
from moeproof.harness.faults.fault import CHANCES, Fault
from moeproof.harness.faults.hang import hunt_hang
from moeproof.harness.faults.healthy import Healthy, healthy
from moeproof.harness.faults.hunt import Hunt, hunt
from moeproof.harness.faults.shrunk import Small, shrunk
from moeproof.harness.faults.side_by_side import comparable, on_our_inputs, on_their_recipe, shot
from moeproof.harness.faults.suites import SUITES

Given = TypeVar("Given")
Made = TypeVar("Made")
Task = tuple[str, str, str, float, int]
"""Class, variant, scheme, chance (1 = always) and the number of the case to begin with."""
SLICES = 16
"""Of the healthy campaign."""


def cases(tier: str) -> list[Case]:
    """The tier's cases with those of far offsets among them, which only plain torch can run on a CPU."""
    first = [*cases_of("default"), *cases_of("far")]
    return first if tier == "default" else [*first, *cases_of("full")[len(cases_of("default")) :]]


def main(classes: Sequence[str], rules: bool, output: Path | None, jobs: int, json: bool) -> int:
    """Hunt the classes (all by default); 0 where all planted ones were caught on the right stage and nothing else alarmed."""
    begin = time.perf_counter()
    chosen = [by_id(name) for name in classes] or list(CATALOGUE)
    jobs = 1 if len(chosen) == 1 else jobs or os.cpu_count() or 1
    campaign = Campaign(chosen, len(cases("default")), jobs)
    with _workers(jobs) as pool:
        for hunted in each(pool, _hunt, tasks_of(chosen)):
            campaign.hunts += hunted
            page.line(hunted, json)
        campaign.default_seconds = time.perf_counter() - begin
        campaign.default_cpu_seconds = sum(h.cpu_seconds for h in campaign.hunts)
        _look_further(campaign, pool, json)
        for small in each(pool, _shrink, _to_shrink(campaign)):
            campaign.smalls.append(small)
            page.small(small, json)
        if not classes:
            for well in each(pool, _healthy, range(SLICES)):
                campaign.well += well
        if rules:
            campaign.ours = on_our_inputs(list(each(pool, shot, comparable(campaign.hunts))))
            campaign.theirs = list(each(pool, on_their_recipe, SUITES))
            campaign.nulls = [*each(pool, nulls.ours, [_with_output()]), *(page.taken(row) for row in campaign.theirs)]
    campaign.seconds = time.perf_counter() - begin
    page.show(campaign, json)
    if output is not None:
        page.write(output, campaign)
    return 0 if campaign.all_well else 1


class _Here(Executor):
    """One worker: this process."""


def _workers(jobs: int) -> Executor:
    if jobs == 1:
        return _Here()
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def each(pool: Executor, work: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """Results in the order of the items."""
    return map(work, items) if isinstance(pool, _Here) else pool.map(work, items)


def tasks_of(chosen: Sequence[Fault]) -> list[Task]:
    """Every planting. What fires by chance takes many calls: first, so that one worker is not left alone with it."""
    by_chance = [(f.id, v, "", p, 0) for f in chosen if f.random for v in f.variants for p in reversed(CHANCES)]
    return by_chance + [(f.id, v, scheme, 1.0, 0) for f in chosen if not f.random for v, scheme in f.plantings]


def _hunt(task: Task) -> list[Hunt]:
    name, variant, scheme, chance, start = task
    fault, listed = by_id(name), cases("full" if start else "default")
    if fault.random:
        return [median(fault, variant, chance, listed)]
    if fault.ground == "ranks":
        return [hunt_hang(fault, variant, listed)]
    return [hunt(fault, variant, scheme, listed, start)]


def _look_further(campaign: Campaign, pool: Executor, json: bool) -> None:
    """Through the rest of the full tier, for what the default tier did not catch."""
    missed = [h for h in campaign.hunts if not h.caught and h.chance == 1.0 and by_id(h.id).ground != "ranks"]
    tasks = [(h.id, h.variant, h.scheme, 1.0, campaign.default_cases) for h in missed]
    for before, (found,) in zip(missed, each(pool, _hunt, tasks), strict=True):
        campaign.hunts[campaign.hunts.index(before)] = found
        page.line([found], json)
    campaign.hunts.sort(key=lambda h: (int(h.id[1:]), h.variant, h.scheme, -h.chance))


def _to_shrink(campaign: Campaign) -> list[Hunt]:
    """One planting of each class that was caught."""
    return list({h.id: h for h in reversed(campaign.hunts) if h.caught}.values())[::-1]


def _shrink(found: Hunt) -> Small:
    return shrunk(by_id(found.id), found)


def _healthy(part: int) -> Healthy:
    return healthy(list(enumerate(cases("full")))[part::SLICES])


def _with_output() -> list[Case]:
    """Cases that null kernels are judged on."""
    return [case for case in cases_of("default") if not case.problem.latent]
