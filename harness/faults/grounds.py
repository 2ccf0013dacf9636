"""What a fault is planted in, and how each ground is judged."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.fault import Dice, Fault, Witness, plant
from moeproof.harness.faults.pipeline import Pipeline, candidate
from moeproof.harness.faults.quant_pipeline import QuantPipeline, quant_candidate
from moeproof.harness.faults.replayed import Replayed
from moeproof.harness.faults.world import SPLITS, TensorParallel, World, world_candidate
from moeproof.harness.judging.checks import CHECKS
from moeproof.harness.judging.judge import judge, judge_lean
from moeproof.harness.judging.sequences import judge_replay, judge_sequence
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
QUIET = (Outcome.PASS, Outcome.UNSUPPORTED, Outcome.VACUOUS)
STATEFUL = ("sequence", "replay")
"""Grounds whose check makes a dozen calls of one instance."""
EVERY = (*CHECKS,)
"""All checks of an ordinary case, the vacuity gate included. Another tuple than CHECKS: findings go without explanations."""


def ground_of(fault: Fault, number: int, scheme: str = "") -> tuple[Pipeline, Candidate]:
    """A healthy pipeline of the fault's ground and its candidate. Worlds take their split in turn, case by case."""
    if fault.ground == "world":
        world = World(list(SPLITS)[number % len(SPLITS)])
        return world, world_candidate(world, fault.id)
    if fault.ground == "quant":
        quantised = QuantPipeline()
        return quantised, quant_candidate(quantised, fault.id, scheme)
    pipeline = {"tensor": TensorParallel, "replay": Replayed}.get(fault.ground, Pipeline)()
    return pipeline, candidate(pipeline, fault.id)


def planted(
    fault: Fault, variant: str, number: int, scheme: str = "", armed: bool = True, dice: Dice | None = None
) -> tuple[Pipeline, Candidate, Witness]:
    """The ground of a case with the variant planted, or its twin."""
    pipeline, thing = ground_of(fault, number, scheme)
    return pipeline, thing, plant(pipeline, fault.variants[variant], armed, dice)


def judged(fault: Fault, pipeline: Pipeline, thing: Candidate, case: Case, lean: bool = False) -> Verdict:
    """One case, in the way of the fault's ground; lean: one call and a look at the values, where one call is enough."""
    if fault.ground == "sequence":
        return judge_sequence(thing, case, "cpu")
    if isinstance(pipeline, Replayed):
        return judge_replay(fault.id, pipeline.capture, case, thing, "cpu")
    return judge_lean(thing, case, "cpu") if lean else judge(thing, case, "cpu", checks=EVERY)


def anew(fault: Fault, variant: str, number: int, scheme: str = "") -> Candidate:
    """A candidate that plants the fault in a fresh ground for each call: nothing is remembered between calls."""

    def run(inputs: Inputs) -> Mapping[str, Tensor]:
        return planted(fault, variant, number, scheme)[0](inputs)

    return replace(ground_of(fault, number, scheme)[1], run=run)


@functools.lru_cache(maxsize=1024)
def vacuous(case: Case) -> bool:
    """The gate's word on a case that is judged by a sequence, a replay or repeats, which do not ask it themselves."""
    thing = quant_candidate(QuantPipeline()) if case.problem.quant.quantised else candidate(Pipeline())
    return judge(thing, case, "cpu", checks=EVERY).outcome is Outcome.VACUOUS


@functools.lru_cache(maxsize=1024)
def inputs_once(case: Case) -> Inputs:
    return make_inputs(case, "cpu")
