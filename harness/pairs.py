"""A seed-style pair as a candidate: run through FusedMoEModularKernel with taps on what passes between its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moeproof.harness.invariants import find_rows
from moeproof.reference.contract.candidate import Candidate, Pair
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEModularKernel
from moeproof.reference.contract.problem import Problem
from moeproof.reference.oracle.experts import input_rows, local_ids

Tensor = torch.Tensor


class Tap:
    """Forwards everything to the real object, and remembers what its methods were given and returned."""

    def __init__(self, inner: object, watch: tuple[str, ...]) -> None:
        self._inner, self._watch = inner, watch
        self.calls: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in self._watch:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            self.calls[name] = (args, _kept(result))
            return result

        return call


def _kept(result: Any) -> Any:
    """Copies of the tensors: what comes after may write over them."""
    if isinstance(result, Tensor):
        return result.clone()
    return tuple(_kept(item) for item in result) if isinstance(result, tuple) else result


def _supports(pair: Pair, problem: Problem) -> str | None:
    if problem.layout != pair.layout:
        return f"works on the {pair.layout} layout, not {problem.layout}"
    if problem.shared or problem.router.zero_experts or problem.latent or problem.scale_on_sum != 1.0:
        return "the seed's pair covers the routed experts only: no shared, zero or latent experts, no scale on the sum"
    return pair.supports(problem)


def run_pair(pair: Pair, inputs: Inputs) -> Mapping[str, Tensor]:
    """One forward call. Shows out, y, and for the batched layout rows and counts; h where workspace2 keeps it."""
    p = inputs.problem
    prepare_finalize = Tap(pair.prepare_finalize(inputs), ("prepare",))
    experts = Tap(pair.experts(inputs), ("apply",))
    kernel = FusedMoEModularKernel(prepare_finalize, experts)  # type: ignore[arg-type]
    ids_dtype = prepare_finalize.topk_indices_dtype()
    out = kernel(
        inputs.hidden_states,
        inputs.w1,
        inputs.w2,
        inputs.topk_weights,
        inputs.topk_ids if ids_dtype is None else inputs.topk_ids.to(ids_dtype),
        inplace=p.inplace,
        activation=str(p.act),
        global_num_experts=p.weight_experts,
        expert_map=inputs.expert_map,
        apply_router_weight_on_input=p.weight_on_input,
    )
    shown: dict[str, Tensor] = {"out": out}
    if "apply" not in experts.calls:
        return shown
    arguments, y = experts.calls["apply"]
    if pair.layout == "standard":
        if y.shape == (p.T, p.slots, p.hidden):
            shown["y"] = y
        if pair.slots_in_workspace2:
            workspace2 = arguments[14]
            shown["h"] = workspace2[: p.T * p.slots * p.I].view(p.T, p.slots, p.I)
    else:
        shown |= _batched(prepare_finalize.calls["prepare"][1], y, inputs)
    return shown


def _batched(prepared: tuple[Any, ...], y: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    """rows and counts as dispatched, and y brought to canonical coordinates through the rows' own bytes."""
    rows, counts = prepared[0], prepared[2]
    shown: dict[str, Tensor] = {"rows": rows, "expert_num_tokens": counts}
    e = inputs.w1.shape[0]
    if counts.shape != (e,) or rows.dim() != 3 or rows.shape[0] != e or y.shape[:2] != rows.shape[:2]:
        return shown
    index, _ = find_rows(rows, counts, inputs, input_rows(inputs, inputs.hidden_states).to(rows.dtype))
    if bool(((index < 0) & (local_ids(inputs) >= 0)).any()):
        return shown
    flat = y.reshape(-1, y.shape[-1])
    live = (index >= 0)[:, :, None]
    shown["y"] = torch.where(live, flat[index.clamp(min=0)], 0) if flat.numel() else flat.new_zeros(*index.shape, y.shape[-1])
    return shown


def as_candidate(thing: object) -> Candidate:
    """Candidate, Pair, or a plain callable with the usual five-argument signature."""
    if isinstance(thing, Candidate):
        return thing
    if isinstance(thing, Pair):
        shows = ("out", "y", "rows", "expert_num_tokens") if thing.layout == "batched" else ("out", "y")
        if thing.slots_in_workspace2:
            shows = (*shows, "h")
        return Candidate(
            name=thing.name,
            run=lambda inputs: run_pair(thing, inputs),
            shows=shows,
            supports=lambda problem: _supports(thing, problem),
            claims=thing.claims,
            backend=thing.backend,
        )
    if callable(thing):
        name = getattr(thing, "__name__", type(thing).__name__).strip("<>")
        return Candidate(name=name, run=lambda inputs: _call_usual(thing, inputs), supports=_supports_usual)
    raise ContractError(f"a candidate is a callable, a Candidate or a Pair, not {type(thing).__name__}")


def _call_usual(function: Any, inputs: Inputs) -> Any:
    return function(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)


def _supports_usual(p: Problem) -> str | None:
    plain = Problem(T=p.T, H=p.H, I=p.I, E=p.E, K=p.K, dtype=p.dtype, router=p.router, storage=p.storage)
    if p != plain or p.router.zero_experts or p.router.fused_shared:
        return "the five-argument signature (hidden_states, w1, w2, topk_weights, topk_ids) means silu and a plain layer"
    return None
