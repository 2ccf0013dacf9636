"""A seed-style pair as a candidate: run through FusedMoEModularKernel with taps on what passes between its parts."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from moeproof.harness.judging.invariants import find_rows
from moeproof.harness.judging.memory import overlap
from moeproof.harness.judging.quant_expect import dispatched, wrong_row_scales
from moeproof.reference.contract.candidate import Candidate, Pair
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEModularKernel
from moeproof.reference.contract.problem import Problem
from moeproof.reference.oracle.experts import local_ids

Tensor = torch.Tensor
QUANT_ARGUMENTS = ("w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1_scale", "a2_scale")


APPLY = (
    *("hidden_states", "w1", "w2", "topk_ids", "activation", "global_num_experts", "expert_map", "w1_scale", "w2_scale"),
    *("w1_zp", "w2_zp", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_num_tokens"),
)
"""The arguments of `apply`, in their order."""


class SharedMemory(Exception):
    """Two arguments of a stage overlap: what one part writes, another reads."""

    def as_finding(self) -> dict[str, Any]:
        return {"tensor": "memory", "message": str(self)}


class Tap:
    """Forwards everything to the real object, and remembers what its methods were given and returned."""

    def __init__(self, inner: object, watch: tuple[str, ...]) -> None:
        self.inner, self._watch = inner, watch
        self.calls: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
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
    out = forward(kernel, inputs, prepare_finalize.topk_indices_dtype())
    shown: dict[str, Tensor] = {"out": out}
    if "apply" not in experts.calls:
        return shown
    arguments, y = experts.calls["apply"]
    _check_apart(arguments)
    if pair.layout == "standard":
        if y.shape == (p.T, p.slots, p.hidden):
            shown["y"] = y
        if pair.slots_in_workspace2:
            workspace2 = arguments[14]
            shown["h"] = workspace2[: p.T * p.slots * p.I].view(p.T, p.slots, p.I)
        if p.quant.a1 is not None:
            xq, xs = prepare_finalize.calls["prepare"][1][:2]
            shown |= {"xq": xq, "xs": xs}
        if pair.taps is not None:
            shown |= pair.taps(experts.inner)  # type: ignore[arg-type]
    else:
        kept = {} if pair.taps is None else pair.taps(experts.inner)  # type: ignore[arg-type]
        shown |= _batched(prepare_finalize.calls["prepare"][1], {**kept, "y": y}, inputs)
    return shown


def forward(kernel: FusedMoEModularKernel, inputs: Inputs, ids_dtype: torch.dtype | None) -> Tensor:
    """One call of the seed's kernel with everything that belongs to these inputs; ids in the dtype that its prepare wants."""
    p = inputs.problem
    out: Tensor = kernel(
        inputs.hidden_states,
        inputs.w1,
        inputs.w2,
        inputs.topk_weights,
        inputs.topk_ids if ids_dtype is None else inputs.topk_ids.to(ids_dtype),
        inplace=p.inplace,
        activation=str(p.act),
        global_num_experts=p.weight_experts,
        expert_map=inputs.expert_map,
        **{name: getattr(inputs, name) for name in QUANT_ARGUMENTS},
        apply_router_weight_on_input=p.weight_on_input,
    )
    return out


def _check_apart(arguments: tuple[Any, ...]) -> None:
    """The alias matrix of `apply`: a workspace shares memory with no other argument."""
    named = {name: t for name, t in zip(APPLY, arguments, strict=True) if isinstance(t, Tensor)}
    for (a, x), (b, y) in itertools.combinations(named.items(), 2):
        if "workspace" in a + b and overlap(x, y):
            raise SharedMemory(f"{a} and {b} of apply share memory")


def _batched(prepared: tuple[Any, ...], results: Mapping[str, Tensor], inputs: Inputs) -> dict[str, Tensor]:
    """rows and counts as dispatched, and the results brought to canonical coordinates through the rows' own bytes."""
    rows, counts = prepared[0], prepared[2]
    shown: dict[str, Tensor] = {"rows": rows, "expert_num_tokens": counts}
    if inputs.problem.quant.a1 is not None and isinstance(prepared[1], Tensor):
        shown["row_scales"] = prepared[1]
    e = inputs.w1.shape[0]
    if counts.shape != (e,) or rows.dim() != 3 or rows.shape[0] != e:
        return shown
    row_scales = shown.get("row_scales")
    if wrong_row_scales(rows, row_scales, inputs):
        return shown
    own, want = dispatched(rows, row_scales, inputs)
    index, _ = find_rows(own, counts, inputs, want)
    if bool(((index < 0) & (local_ids(inputs) >= 0)).any()):
        return shown
    a2 = inputs.problem.quant.a2
    for name, t in results.items():
        if name == "hs" and a2 is not None and not a2.by_token:
            shown[name] = t  # one scale for all rows, also where there is but one row
        elif t.shape[:2] == rows.shape[:2]:
            shown[name] = _at(t, index)
    return shown


def _at(t: Tensor, index: Tensor) -> Tensor:
    """(e, C, X) at flat rows (T, K) -> (T, K, X), zero where there is no row. Bytes are moved: not every dtype can index."""
    flat = t.reshape(-1, t.shape[-1]).contiguous().view(torch.uint8)
    if not flat.numel():
        return torch.zeros(*index.shape, t.shape[-1], dtype=t.dtype, device=t.device)
    picked = flat[index.clamp(min=0).flatten()]
    return torch.where((index.flatten() >= 0)[:, None], picked, 0).view(t.dtype).view(*index.shape, t.shape[-1])


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
            run=functools.partial(run_pair, thing),
            shows=shows,
            supports=lambda problem: _supports(thing, problem),
            claims=thing.claims,
            backend=thing.backend,
            claims_in=thing.claims_in,
        )
    if callable(thing):
        name = getattr(thing, "__name__", type(thing).__name__).strip("<>")
        run = functools.partial(_call_usual, thing)
        return Candidate(name=name, run=run, supports=_supports_usual, source=_address(thing))
    raise ContractError(f"a candidate is a callable, a Candidate or a Pair, not {type(thing).__name__}")


def untapped(candidate: Candidate) -> Callable[[Inputs], Any]:
    """What a candidate runs, without what is copied of a pair on the way: for whoever times it."""
    run = candidate.run
    if not (isinstance(run, functools.partial) and run.func is run_pair):
        return run
    (pair,) = run.args

    def call(inputs: Inputs) -> Tensor:
        prepare_finalize = pair.prepare_finalize(inputs)
        kernel = FusedMoEModularKernel(prepare_finalize, pair.experts(inputs))
        return forward(kernel, inputs, prepare_finalize.topk_indices_dtype())

    return call


def _address(function: object) -> str:
    """How a command line names a callable: `file.py:name` for what lies below here, else `module:name`; empty for neither."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "<unknown>")
    if module not in sys.modules or not name.isidentifier():
        return ""  # a lambda, a local function, an instance
    path = Path(getattr(sys.modules[module], "__file__", None) or "")
    if path.is_absolute() and path.is_relative_to(Path.cwd()) and "site-packages" not in path.parts:
        return f"{path.relative_to(Path.cwd())}:{name}"
    return "" if module == "__main__" else f"{module}:{name}"


def _call_usual(function: Any, inputs: Inputs) -> Any:
    return function(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)


def _supports_usual(p: Problem) -> str | None:
    plain = Problem(T=p.T, H=p.H, I=p.I, E=p.E, K=p.K, dtype=p.dtype, router=p.router, storage=p.storage)
    if p != plain or p.router.zero_experts or p.router.fused_shared:
        return "the five-argument signature (hidden_states, w1, w2, topk_weights, topk_ids) means silu and a plain layer"
    return None
