"""Sets of inputs that share a model's weights: calls in turn touch other activations, and for few tokens other experts."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases import routing
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.tokens import tokens_at
from moeproof.harness.cases.values import RECIPES
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.timing.points import Work
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.chain import chain
from moeproof.reference.oracle.rounding import round_to
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
ORACLE_BYTES = 8 * 2**30
"""Memory for the float64 intermediates of one chunk of tokens, about."""


@functools.lru_cache(maxsize=1)
def _weights(work: Work, device: str) -> dict[str, Tensor]:
    """w1 and w2, and what belongs to them where they are quantised."""
    return {name: t for name, t in make_inputs(work.case, device).tensors() if name.startswith(("w1", "w2"))}


def make_sets(work: Work, count: int, device: str) -> list[Inputs]:
    """`count` sets of inputs of this point; set 0 holds what make_inputs gives for its case, without the logits."""
    # One token, and the first routing: every point of a model finds the same weights.
    weights = _weights(replace(work, M=1, routing="uniform"), device)
    p, sets = work.problem, []
    make_x = RECIPES["normal"][0]
    for seed in range(count):
        x = round_to(make_x(p, Stream(seed, "x", device)), p.fmt).to(p.fmt.dtype)
        ids, routed = routing.make(p, work.routing, "normal", Stream(seed, "routing", device))
        sets.append(Inputs(problem=p, hidden_states=x, topk_ids=ids, topk_weights=routed, **weights))
    return sets


@dataclass(frozen=True)
class Answer:
    """The oracle's `out` for one set of inputs, with its bound: made once, held against every configuration."""

    value: Value

    def check(self, out: Tensor) -> Comparison:
        """Every element, against the derived bound of the whole chain."""
        return compare("out", out, self.value)


def answer(inputs: Inputs, claims: Claims) -> Answer:
    """Chunks of tokens, so that float64 intermediates of a full-size prefill fit beside the weights."""
    p = inputs.problem
    chunk = max(1, ORACLE_BYTES // (8 * 10 * p.slots * p.N))
    parts = []
    for first in range(0, p.T, chunk):
        some = tokens_at(inputs, torch.arange(first, min(first + chunk, p.T), device=inputs.device))
        parts.append(chain(some, claims)["out"])
    bounds = [part.bound for part in parts if part.bound is not None]
    return Answer(Value(torch.cat([part.value for part in parts]), torch.cat(bounds), None, parts[0].fmt))
