"""A suite of somebody else's against the catalogue: their check, our faulty layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moeproof.harness.faults.catalogue import CATALOGUE
from moeproof.harness.faults.fault import Fault, plant
from moeproof.harness.faults.pipeline import Pipeline
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import DTYPES, Problem
from moeproof.reference.contract.schemes import FORMATS

Tensor = torch.Tensor
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden_states (T, H), w1 (E, 2I, H), w2 (E, H, I), topk_weights (T, K), topk_ids (T, K)) -> (T, H)."""
SINGLE = ("layer", "sequence")
"""Grounds that one instance with the usual signature can stand on."""


@dataclass(frozen=True)
class Answer:
    """What a check made of one faulty layer. A fault that never fired was not tried by its inputs."""

    id: str
    name: str
    variant: str
    fired: bool
    caught: bool

    def __str__(self) -> str:
        what = "caught" if self.caught else "let through" if self.fired else "never triggered"
        return f"{self.id} {self.name} {self.variant}".rstrip() + f": {what}"


def usual(pipeline: Pipeline) -> Layer:
    """The pipeline as a plain silu layer with the usual signature."""

    def moe(hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        (T, H), (E, _, I), K = hidden_states.shape, (w1.shape[0], 0, w2.shape[2]), topk_ids.shape[1]  # noqa: E741
        dtype = next(name for name in DTYPES if FORMATS[name].dtype == hidden_states.dtype)
        # Ids may repeat in a row, so that K > E is legal here: the router is not asked.
        problem = Problem(T=T, H=H, I=I, E=max(E, K), K=K, dtype=dtype)
        return pipeline(Inputs(problem, hidden_states, topk_ids, topk_weights.float(), w1, w2))["out"]

    return moe


def ask(check: Callable[[Layer], object], faults: Sequence[Fault] = CATALOGUE) -> Iterator[Answer]:
    """Run the check on every faulty layer. It rejects a layer by raising or by returning False."""
    for fault in faults:
        if fault.ground not in SINGLE or fault.section == "router":
            continue  # the usual signature has no ranks, no graphs and no router
        for variant, edit in fault.variants.items():
            pipeline = Pipeline()
            witness = plant(pipeline, edit)
            yield Answer(fault.id, fault.name, variant, *_verdict(check, pipeline, lambda w=witness: w.fired > 0))  # type: ignore[misc]


def _verdict(check: Callable[[Layer], object], pipeline: Pipeline, fired: Callable[[], bool]) -> tuple[bool, bool]:
    """(fired, caught)."""
    try:
        caught = check(usual(pipeline)) is False
    except Exception:  # however a suite rejects, it rejects
        caught = True
    return fired(), caught and fired()
