"""What a model's own block was given and what it answered, as data. Needs torch and safetensors only."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moeproof.reference.contract import Inputs, Problem

Tensor = torch.Tensor


@dataclass(frozen=True)
class Witness:
    """One run of a block: T tokens, E logits per token (identity experts included), H hidden.

    `inputs.topk_ids` and `topk_weights` are placeholders: the oracle routes. Logits are router_x @ router_w.T + router_b.
    """

    inputs: Inputs
    router_x: Tensor
    """(T, H) float64: what the router multiplies; the block's input unless it normalises first."""
    router_w: Tensor
    """(E, H)."""
    out: Tensor
    """(T, H) float32: the block's answer."""
    router_b: Tensor | None = None
    """(E,)."""
    router_x_error: float = 0.0
    """Relative error of the block's own float32 router_x, in units of 2^-24. 0 where it is the input itself."""
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        return self.inputs.problem

    def with_problem(self, **changes: object) -> Witness:
        """The same tensors read as another problem."""
        return replace(self, inputs=replace(self.inputs, problem=replace(self.problem, **changes)))  # type: ignore[arg-type]

    def with_router(self, **changes: object) -> Witness:
        return self.with_problem(router=replace(self.problem.router, **changes))  # type: ignore[arg-type]

    def with_act(self, **changes: object) -> Witness:
        return self.with_problem(act=replace(self.problem.act, **changes))  # type: ignore[arg-type]

    def with_inputs(self, **tensors: Tensor | None) -> Witness:
        return replace(self, inputs=replace(self.inputs, **tensors))  # type: ignore[arg-type]


OWN = ("router_x", "router_w", "router_b", "out")


def save(witness: Witness, path: Path) -> None:
    """One safetensors file: tensors by name, the problem's case line and `meta` as metadata. Strides are not kept."""
    tensors = dict(witness.inputs.tensors())
    tensors |= {name: value for name in OWN if (value := getattr(witness, name)) is not None}
    for name in ("topk_ids", "topk_weights"):
        del tensors[name]
    if torch.equal(witness.router_x, witness.inputs.hidden_states.double()):
        del tensors["router_x"]
    own = {"problem": str(witness.problem), "router_x_error": repr(witness.router_x_error)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=witness.meta | own)


def load(path: Path) -> Witness:
    """The inverse of save."""
    with safe_open(path, framework="pt") as file:
        meta = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (safe_open is no mapping)
    line = meta.pop("problem")
    problem = Problem.from_options(dict(part.split("=", 1) for part in line.split(",")))
    own = {name: tensors.pop(name) for name in OWN if name in tensors}
    inputs = unrouted(problem, **tensors)
    own.setdefault("router_x", inputs.hidden_states.double())
    return Witness(inputs, **own, router_x_error=float(meta.pop("router_x_error")), meta=meta)


def unrouted(problem: Problem, **tensors: Tensor | None) -> Inputs:
    """Inputs whose routing is not known yet: every slot -1."""
    ids = torch.full((problem.T, problem.slots), -1, dtype=torch.int32)
    return Inputs(problem=problem, topk_ids=ids, topk_weights=torch.zeros(ids.shape), **tensors)  # type: ignore[arg-type]
