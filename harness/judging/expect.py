"""What each shown tensor must be: isolated stages from the candidate's own upstream tensors, the chain for the rest."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch

from moeproof.harness.judging import quant_expect
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.invariants import check_counts, check_permute, find_rows
from moeproof.harness.judging.quant_expect import dispatched, wrong_row_scales
from moeproof.harness.judging.route_check import check_route
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle import typical
from moeproof.reference.oracle.activations import activate
from moeproof.reference.oracle.chain import chain, shared_expert
from moeproof.reference.oracle.combine import combine
from moeproof.reference.oracle.experts import gemm1, gemm2, input_rows, live_slots
from moeproof.reference.oracle.products import Operand, plain
from moeproof.reference.oracle.value import Trace, Value

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
JUDGED = ("gate_up", "h", "y", "out")
"""Tensors with a bound, in the order of the stages."""
UPSTREAM = {"gate_up": (), "h": ("gate_up",), "y": ("h",), "out": ("y",)}
"""What the isolated stage starts from, where the candidate shows it."""


def shapes(p: Problem, inputs: Inputs) -> dict[str, tuple[int, ...] | None]:
    """Shape of every canonical tensor; None where the candidate chooses it."""
    T, K = inputs.topk_ids.shape
    a1, a2 = p.quant.a1, p.quant.a2
    quantised: dict[str, tuple[int, ...] | None] = {}
    if a1 is not None:
        quantised |= {"xq": a1.code_shape(T, p.hidden), "xs": a1.scale_shape(T, p.hidden), "row_scales": None}
    if a2 is not None:
        hs = a2.scale_shape(T, K, p.I) if a2.by_token else (1, 1, 1)
        quantised |= {"hq": a2.code_shape(T, K, p.I), "hs": hs}
    return quantised | {
        "topk_ids": (T, p.slots),
        "topk_weights": (T, p.slots),
        "rows": None,
        "expert_num_tokens": (inputs.w1.shape[0],),
        "sorted_slots": None,
        "block_expert": None,
        "num_padded": None,
        "gate_up": (T, K, p.N),
        "h": (T, K, p.I),
        "y": (T, K, p.hidden),
        "out": (T, p.H),
    }


class Expectation:
    """The oracle's answers for one set of inputs, worked out once and only as far as they are asked for."""

    def __init__(self, inputs: Inputs, claims: Claims) -> None:
        self.inputs, self.claims = inputs, claims
        self._chain: Trace | None = None
        self._shared: tuple[Tensor, Tensor] | None = None

    def chained(self, name: str) -> Value:
        """From the case's inputs, with the propagated bound."""
        if self._chain is None:
            self._chain = chain(self.inputs, self.claims)
        return self._chain[name]

    def noise(self, name: str, shown: Shown) -> float:
        """Relative noise that the bound of this tensor must reject: 10%, or more where what is legal upstream makes more.

        Twice the unit roundoff of the second activation format, where requantisation lies between what is judged and what it is
        judged by. For a gelu whose gate is not shown, 4 (1 + 4^2) unit roundoffs: its slope at -4 turns the gate's rounding
        into 1 + g^2 of them, and 4 are seven standard deviations.
        """
        p, a2 = self.inputs.problem, self.inputs.problem.quant.a2
        if name == "h" and "gate_up" not in shown and p.act.name.startswith("gelu"):
            return max(0.1, 4 * 17 * p.fmt.unit)
        upstream = {"y": ("h", "hq"), "out": ("y",)}.get(name)
        isolated = upstream is None or any(n in shown for n in upstream)
        return 0.1 if a2 is None or isolated else max(0.1, 2 * a2.format.unit)

    def value(self, name: str, shown: Shown) -> Value:
        """What `name` must be, given what else the candidate showed."""
        p, got = self.inputs.problem, shown[name]
        fmt = format_of(got.dtype)
        if p.quant.quantised and (name == "gate_up" or (name == "y" and quant_expect.knows_hidden(shown))):
            value = quant_expect.product(self.inputs, name, shown, fmt, self.claims)
            return self._typically(value, name, quant_expect.operand(self.inputs, name, shown))
        if name == "gate_up" and not p.latent:
            value = gemm1(self.inputs, self.inputs.hidden_states, fmt, self.claims)
            return self._typically(value, name, plain(input_rows(self.inputs, self.inputs.hidden_states), p.fmt))
        if name == "h" and "gate_up" in shown:
            return activate(shown["gate_up"], p.act, fmt, self.claims, live_slots(self.inputs))
        if name == "y" and "h" in shown:
            return self._typically(gemm2(self.inputs, shown["h"], fmt, self.claims), name, plain(shown["h"], p.fmt))
        if name == "out" and "y" in shown and not p.latent:
            if p.shared and self._shared is None:
                self._shared = shared_expert(self.inputs, self.claims)
            return combine(self.inputs, shown["y"], fmt, self.claims, self._shared)
        return self.chained(name)

    def _typically(self, value: Value, name: str, rows: Operand) -> Value:
        """A product with the size that its error has as a rule."""
        weights = "w1" if name == "gate_up" else "w2"
        return replace(value, typical=functools.partial(typical.grouped, self.inputs, weights, rows, self.claims))


def judge_shown(shown: Shown, expect: Expectation) -> tuple[dict[str, Comparison], dict[str, Value]]:
    """Every shown tensor judged, in the order of the stages; and the Values, for the vacuity gate."""
    inputs, claims = expect.inputs, expect.claims
    results: dict[str, Comparison] = {}
    values: dict[str, Value] = {}
    if "topk_ids" in shown:
        results["topk_ids"] = check_route(shown["topk_ids"], shown["topk_weights"], inputs, claims)
    if "expert_num_tokens" in shown:
        results["expert_num_tokens"] = check_counts(shown["expert_num_tokens"], inputs)
        if not results["expert_num_tokens"].findings and "rows" in shown:
            results["rows"] = _check_rows(shown, inputs)
    if "sorted_slots" in shown:
        results["sorted_slots"] = check_permute(shown["sorted_slots"], shown["block_expert"], shown["num_padded"], inputs)
    if inputs.problem.quant.quantised:
        results |= quant_expect.judge_codes(shown, inputs)
    for name in JUDGED:
        if name in shown:
            values[name] = expect.value(name, shown)
            experts = inputs.topk_ids if shown[name].dim() == 3 else None
            results[name] = compare(name, shown[name], values[name], experts, _halves(name, inputs.problem))
    return results, values


def _halves(name: str, p: Problem) -> str:
    """How gate and up lie in the columns of a tensor, for words about them."""
    if name != "gate_up" or not p.act.gated:
        return ""
    return "interleaved" if p.act.interleaved else "packed"


def _check_rows(shown: Shown, inputs: Inputs) -> Comparison:
    words = wrong_row_scales(shown["rows"], shown.get("row_scales"), inputs)
    if words:
        return Comparison((Finding(TENSORS["rows"], "row_scales", words),), 1, 0.0)
    rows, want = dispatched(shown["rows"], shown.get("row_scales"), inputs)
    _, findings = find_rows(rows, shown["expert_num_tokens"], inputs, want)
    return Comparison(tuple(findings), int(live_slots(inputs).sum()) * rows.shape[-1], 0.0)
