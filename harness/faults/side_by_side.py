"""What each public rule does with the same faults: on our inputs, and on its own suite's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.fault import Fault, plant
from moeproof.harness.faults.pipeline import CLAIMS, Pipeline
from moeproof.harness.faults.rules import RULES, Rule
from moeproof.harness.faults.run import Hunt, ground_of
from moeproof.harness.faults.suites import Suite, make
from moeproof.harness.judging.compare import null_kernels
from moeproof.harness.judging.memory import Poison, guard_inputs
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.chain import chain

Tensor = torch.Tensor
SEEDS = (1,)
"""Of a recipe's inputs; any may catch."""


@dataclass(frozen=True)
class Row:
    """One rule or recipe: of `faults` that fired, how many it rejected; the ids of those it accepted."""

    name: str
    rule: str
    faults: int
    rejected: int
    accepted: tuple[str, ...]
    nulls: tuple[str, ...] = ()
    """Null kernels that it accepts."""
    healthy: bool = True
    """Accepts the healthy pipeline."""


def _faulty_out(fault: Fault, variant: str, number: int, inputs: Inputs, poison: str | None) -> tuple[Tensor | None, bool]:
    """(out, fired) of one call; None where the call threw. A router's faults reach the output through its own choice."""
    pipeline, _ = ground_of(fault, number)
    # A copy: some faults write to their arguments.
    inputs = guard_inputs(inputs, poison or "big")[0]
    witness = plant(pipeline, fault.variants[variant])
    try:
        with Poison(poison) if poison else nullcontext():
            if fault.section == "router":
                inputs = routed(pipeline, inputs)
            return pipeline(inputs)["out"].double(), witness.fired > 0
    except Exception:  # an error is a rejection by any suite
        return None, True


def routed(pipeline: Pipeline, inputs: Inputs) -> Inputs:
    """The same inputs with the pipeline's own ids and weights."""
    ids, weights = pipeline.route(inputs)
    return inputs.map({"topk_ids": ids, "topk_weights": weights})


def on_our_inputs(hunts: Sequence[Hunt]) -> list[Row]:
    """Every rule on the very case, memory included, on which the harness caught each fault. Single calls of one process."""
    taken = [h for h in hunts if h.caught and not by_id(h.id).random and by_id(h.id).ground in ("layer", "world", "tensor")]
    verdicts: dict[str, list[tuple[str, bool]]] = {name: [] for name in RULES}
    unwell: set[str] = set()
    for h in taken:
        fault, inputs = by_id(h.id), make_inputs(parse_case(h.case), "cpu")
        if fault.section == "router":
            inputs = routed(Pipeline(), inputs)
        want, dtype = chain(inputs, CLAIMS)["out"].value, inputs.problem.fmt.dtype
        well = Pipeline()(inputs.map({"hidden_states": inputs.hidden_states.clone()}))["out"].double()
        got, _ = _faulty_out(fault, h.variant, h.number, inputs, "nan")
        for rule in RULES.values():
            rejected = got is None or not rule.accept(got, want, dtype)
            verdicts[rule.name].append((f"{h.id} {h.variant}".strip(), rejected))
            if not rule.accept(well, want, dtype):
                unwell.add(rule.name)
    return [_row(name, name, results, healthy=name not in unwell) for name, results in verdicts.items()]


def _row(name: str, rule: str, results: Sequence[tuple[str, bool]], **rest: object) -> Row:
    passed = tuple(fault for fault, rejected in results if not rejected)
    return Row(name, rule, len(results), sum(r for _, r in results), passed, **rest)  # type: ignore[arg-type]


def on_their_recipe(suite: Suite) -> Row:
    """A suite's inputs and rule against every planted fault: one call on clean memory.

    A fault that the recipe cannot trigger is accepted: nobody would have seen it.
    """
    rule = RULES[suite.rule]
    drawn = [make(suite, seed) for seed in SEEDS]
    wanted = [chain(inputs, CLAIMS)["out"].value for inputs in drawn]
    results = []
    for fault in CATALOGUE:
        if fault.ground == "ranks":
            continue  # no suite read here gives a hang a verdict
        for variant in fault.variants:
            caught = any(_rejects(rule, fault, variant, i, w) for i, w in zip(drawn, wanted, strict=True))
            results.append((f"{fault.id} {variant}".strip(), caught))
    dtype = drawn[0].problem.fmt.dtype
    nulls = [kind for kind, wrong in null_kernels(wanted[0]).items() if rule.accept(wrong, wanted[0], dtype)]
    healthy = all(rule.accept(Pipeline()(i)["out"].double(), w, dtype) for i, w in zip(drawn, wanted, strict=True))
    return _row(suite.name, suite.rule, results, nulls=tuple(nulls), healthy=healthy)


def _rejects(rule: Rule, fault: Fault, variant: str, inputs: Inputs, want: Tensor) -> bool:
    got, fired = _faulty_out(fault, variant, 1, inputs, None)
    if not fired:
        return False
    return got is None or not rule.accept(got, want, inputs.problem.fmt.dtype)
