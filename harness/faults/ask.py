"""A suite of somebody else's against the catalogue: their check, our faulty layers.

Three ways to be given them, from the narrowest to the widest: `ask` for tests of a layer with the usual five arguments,
`ask_router` for tests of a router, `ask_candidates` for whatever can call a Candidate: every stage, scheme and rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from moeproof.harness.faults.catalogue import CATALOGUE
from moeproof.harness.faults.fault import Fault, plant
from moeproof.harness.faults.grounds import ground_of, planted
from moeproof.harness.faults.pipeline import Pipeline
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import check as require
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import DTYPES, Problem
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.schemes import FORMATS

Tensor = torch.Tensor
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(hidden_states (T, H), w1 (E, 2I, H), w2 (E, H, I), topk_weights (T, K), topk_ids (T, K)) -> (T, H)."""
Route = Callable[..., tuple[Tensor, Tensor]]
"""(logits float32 (T, E), bias float32 (E,) = None) -> (topk_weights float32 (T, K), topk_ids int32 (T, K))."""
Thing = TypeVar("Thing")
SINGLE = ("layer", "sequence")
"""Grounds that one instance with the usual signature can stand on."""
CALLED = (*SINGLE, "quant", "world", "tensor")
"""Grounds that a Candidate can stand on; the others are graphs, and ranks that hang."""
ROUTER = Router.parse("softmax:renorm=sum")


@dataclass(frozen=True)
class Answer:
    """What a check made of one faulty layer. A fault that never fired was not tried by its inputs."""

    id: str
    name: str
    variant: str
    fired: bool
    caught: bool
    scheme: str = ""

    def __str__(self) -> str:
        what = "caught" if self.caught else "let through" if self.fired else "never triggered"
        return " ".join(filter(None, (self.id, self.name, self.variant, self.scheme))) + f": {what}"


def usual(pipeline: Pipeline) -> Layer:
    """The pipeline as a plain silu layer with the usual signature."""

    def moe(hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        (T, H), (E, _, I), K = hidden_states.shape, (w1.shape[0], 0, w2.shape[2]), topk_ids.shape[1]  # noqa: E741
        dtype = next(name for name in DTYPES if FORMATS[name].dtype == hidden_states.dtype)
        # Ids may repeat in a row, so that K > E is legal here: the router is not asked.
        problem = Problem(T=T, H=H, I=I, E=max(E, K), K=K, dtype=dtype)
        return pipeline(Inputs(problem, hidden_states, topk_ids, topk_weights.float(), w1, w2))["out"]

    return moe


def route_of(pipeline: Pipeline, router: Router, K: int) -> Route:
    """The pipeline's router as a function of logits and correction bias."""

    def route(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        T, E = logits.shape
        problem = Problem(T=T, H=1, I=1, E=E - router.zero_experts, K=K, router=router)
        x, w1, w2 = torch.zeros(T, 1, dtype=torch.bfloat16), torch.zeros(1, 2, 1), torch.zeros(1, 1, 1)
        ids, weights = torch.zeros(T, K, dtype=torch.int32), torch.zeros(T, K)
        zero = torch.zeros(E) if router.bias and bias is None else bias
        chosen = pipeline.route(Inputs(problem, x, ids, weights, w1, w2, logits=logits.float(), correction_bias=zero))
        return chosen[1], chosen[0]

    return route


def ask(check: Callable[[Layer], object], faults: Sequence[Fault] = CATALOGUE) -> Iterator[Answer]:
    """Run the check on every faulty layer. It rejects a layer by raising or by returning False.

    Raises ContractError where it rejects the healthy layer too: then it says nothing about faults.
    """
    # The usual signature has no ranks, no graphs and no router.
    asked = [f for f in faults if f.ground in SINGLE and f.section != "router"]
    return _answers(check, usual, asked)


def ask_router(
    check: Callable[[Route], object], router: Router = ROUTER, K: int = 2, faults: Sequence[Fault] = CATALOGUE
) -> Iterator[Answer]:
    """The same for tests of a router of this kind, with K slots a token."""
    asked = [f for f in faults if f.section == "router" and f.ground in SINGLE]
    return _answers(check, lambda pipeline: route_of(pipeline, router, K), asked)


def ask_candidates(check: Callable[[Candidate], object], faults: Sequence[Fault] = CATALOGUE) -> Iterator[Answer]:
    """The same for whatever calls `candidate.run(inputs)`: all stages shown, quantised schemes and simulated ranks.

    `candidate.supports(problem)` says which inputs it takes; a check that has none of them never triggers the fault.
    """
    healthy: set[tuple[str, str]] = set()
    for fault in faults:
        for variant, scheme in fault.plantings if fault.ground in CALLED else ():
            if (fault.ground, scheme) not in healthy:
                healthy.add((fault.ground, scheme))
                _accepts(check, ground_of(fault, 0, scheme)[1])
            _, thing, witness = planted(fault, variant, 0, scheme)
            rejected = _rejects(check, thing)
            yield Answer(fault.id, fault.name, variant, witness.fired > 0, rejected and witness.fired > 0, scheme)


def _answers(check: Callable[[Thing], object], given: Callable[[Pipeline], Thing], faults: Sequence[Fault]) -> Iterator[Answer]:
    _accepts(check, given(Pipeline()))
    for fault in faults:
        for variant, edit in fault.variants.items():
            pipeline = Pipeline()
            witness = plant(pipeline, edit)
            rejected = _rejects(check, given(pipeline))
            yield Answer(fault.id, fault.name, variant, witness.fired > 0, rejected and witness.fired > 0)


def _accepts(check: Callable[[Thing], object], healthy: Thing) -> None:
    """What the check says of a healthy one, before it is asked about faults."""
    try:
        fine = check(healthy) is not False
        why = "returned False"
    except Exception as error:  # however a suite rejects, it rejects
        fine, why = False, f"raised {type(error).__name__}: {error}"
    require(fine, f"the check rejects the healthy layer ({why.splitlines()[0]}), so it says nothing about faulty ones")


def _rejects(check: Callable[[Thing], object], faulty: Thing) -> bool:
    try:
        return check(faulty) is False
    except Exception:  # however a suite rejects, it rejects
        return True
