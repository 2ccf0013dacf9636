"""What each public rule does with the same faults: on our inputs, and on its own suite's recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.grounds import planted
from moeproof.harness.faults.hunt import Hunt
from moeproof.harness.faults.nulls import accepted_by
from moeproof.harness.faults.pipeline import CLAIMS, Pipeline
from moeproof.harness.faults.quant_pipeline import QuantPipeline
from moeproof.harness.faults.rules import RULES
from moeproof.harness.faults.suites import Suite, make
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.judging.memory import Poison, guard_inputs
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.chain import chain

Tensor = torch.Tensor
SINGLE = ("layer", "world", "tensor", "quant")
"""Grounds that one call shows."""
OFF = ("quant", "ranks")
"""Grounds that a recipe of an unquantised suite has not."""


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
    false_alarms: int = 0
    """Inputs on which it rejects the healthy pipeline."""
    idle: int = 0
    """Faults that its inputs never triggered: no rule could see them."""
    ours: int = 0
    """Faults that our own bounds let through on the same calls, every stage shown."""


@dataclass(frozen=True)
class Shot:
    """One planting on the very case, memory included, on which the harness caught it: what each rule makes of it."""

    label: str
    rejected: dict[str, bool]
    healthy: dict[str, bool]


def _well(inputs: Inputs) -> Pipeline:
    return QuantPipeline() if inputs.problem.quant.quantised else Pipeline()


def _faulty_out(
    fault: Fault, variant: str, number: int, scheme: str, inputs: Inputs, poison: str | None
) -> tuple[Tensor | None, bool, Mapping[str, Tensor]]:
    """(out, fired, shown) of one call; None where it threw. A router's faults reach the output through its own choice."""
    pipeline, _, witness = planted(fault, variant, number, scheme)
    # A copy: some faults write to their arguments.
    inputs = guard_inputs(inputs, poison or "big")[0]
    try:
        with Poison(poison) if poison else nullcontext():
            if fault.section == "router":
                inputs = routed(pipeline, inputs)
            shown = pipeline(inputs)
            return shown["out"].double(), witness.fired > 0, shown
    except Exception:  # an error is a rejection by any suite
        return None, True, {}


def routed(pipeline: Pipeline, inputs: Inputs) -> Inputs:
    """The same inputs with the pipeline's own ids and weights."""
    ids, weights = pipeline.route(inputs)
    return inputs.map({"topk_ids": ids, "topk_weights": weights})


def comparable(hunts: Sequence[Hunt]) -> list[Hunt]:
    """What a rule on one call of one process can be asked about."""
    return [h for h in hunts if h.caught and not by_id(h.id).random and by_id(h.id).ground in SINGLE]


def shot(h: Hunt) -> Shot:
    """Every rule on one planting that the harness caught."""
    fault, inputs = by_id(h.id), make_inputs(parse_case(h.case), "cpu")
    if fault.section == "router":
        inputs = routed(Pipeline(), inputs)
    want, dtype = chain(inputs, CLAIMS)["out"].value, inputs.problem.fmt.dtype
    well = _well(inputs)(inputs.map({"hidden_states": inputs.hidden_states.clone()}))["out"].double()
    got, _, _ = _faulty_out(fault, h.variant, h.number, h.scheme, inputs, "nan")
    rejected = {name: got is None or not rule.accept(got, want, dtype) for name, rule in RULES.items()}
    return Shot(h.label, rejected, {name: rule.accept(well, want, dtype) for name, rule in RULES.items()})


def on_our_inputs(shots: Sequence[Shot]) -> list[Row]:
    """A row for each rule. Where it rejects the healthy pipeline as well, it has said nothing about the fault."""
    rows = []
    for name in RULES:
        told = [(s.label, s.rejected[name]) for s in shots if s.healthy[name]]
        rows.append(_row(name, name, told, false_alarms=len(shots) - len(told)))
    return rows


def _row(name: str, rule: str, results: Sequence[tuple[str, bool]], **rest: object) -> Row:
    passed = tuple(fault for fault, rejected in results if not rejected)
    return Row(name, rule, len(results), sum(r for _, r in results), passed, **rest)  # type: ignore[arg-type]


def on_their_recipe(suite: Suite) -> Row:
    """A suite's inputs and rule against every fault of its scheme: one call on clean memory.

    A fault that the recipe cannot trigger is accepted: nobody would have seen it. The reference quantises as the pipeline
    does, which favours suites whose own reference does not.
    """
    rule, inputs = RULES[suite.rule], make(suite, 1)
    want, dtype = chain(inputs, CLAIMS)["out"].value, inputs.problem.fmt.dtype
    scheme = "" if suite.scheme == "none" else suite.scheme
    asked = [f for f in CATALOGUE if (f.ground == "quant" if scheme else f.ground not in OFF)]
    results, idle, ours = [], 0, 0
    for fault, variant in [(f, v) for f in asked for v, own in f.plantings if own == scheme]:
        got, fired, shown = _faulty_out(fault, variant, 1, scheme, inputs, None)
        rejected = fired and (got is None or not rule.accept(got, want, dtype))
        results.append((f"{fault.id} {variant}".strip(), rejected))
        idle += not fired
        ours += not (fired and (got is None or _out_of_bounds(shown, inputs)))
    nulls = accepted_by(lambda wrong: rule.accept(wrong, want, dtype), inputs, want)
    healthy = rule.accept(_well(inputs)(inputs)["out"].double(), want, dtype)
    return _row(suite.name, suite.rule, results, nulls=nulls, false_alarms=int(not healthy), idle=idle, ours=ours)


def _out_of_bounds(shown: Mapping[str, Tensor], inputs: Inputs) -> bool:
    """Whether our own policy rejects any shown tensor."""
    return any(r.findings for r in judge_shown(shown, Expectation(inputs, CLAIMS))[0].values())
