"""Whole stages of the plain pipeline (harness/faults) as functions, and a candidate with some of them replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeproof.harness.faults import Pipeline as Layer
from moeproof.harness.faults.permute import Plan
from moeproof.reference.contract import Activation, Candidate, Inputs

Tensor = torch.Tensor
BLOCK = 4


def route(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return Layer().route(inputs)


def _plan(ids: Tensor, experts: int) -> Plan:
    return Layer().plan(ids.long(), experts, BLOCK)


def align(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert, padded to blocks, without what lies behind the last used block."""
    plan = _plan(Layer().local_ids(inputs.topk_ids, inputs), inputs.w1.shape[0])
    return plan.slots[: plan.used].int(), plan.blocks[: plan.used // BLOCK].int(), torch.tensor([plan.used])


def gemm(rows: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """(T, K, A) x (e, B, A) -> (T, K, B) in the dtype of rows; dead slots are zero."""
    plan = _plan(torch.where(ids < w.shape[0], ids, -1), w.shape[0])
    slots = torch.where(plan.slots < ids.numel(), plan.slots, -1)
    out = torch.zeros(ids.numel(), w.shape[1], dtype=rows.dtype)
    Layer().grouped_gemm("gemm", rows.flatten(0, 1), slots, w, None, plan, slots, out)
    return out.view(*ids.shape, w.shape[1])


def act(gate_up: Tensor) -> Tensor:
    return Layer().activate(gate_up, Activation())


def gemm1(inputs: Inputs) -> Tensor:
    T, K = inputs.topk_ids.shape
    return gemm(inputs.hidden_states[:, None].expand(T, K, -1), inputs.w1, inputs.topk_ids)


def gemm2(inputs: Inputs, h: Tensor) -> Tensor:
    return gemm(h, inputs.w2, inputs.topk_ids)


def combine(inputs: Inputs, y: Tensor) -> Tensor:
    return Layer().combine(inputs, y, inputs.topk_weights)


@dataclass(frozen=True)
class Pipeline:
    """One function per stage; `replace(Pipeline(), act=...)` plants a fault in ACT."""

    route: Callable[[Inputs], tuple[Tensor, Tensor]] = route
    align: Callable[[Inputs], tuple[Tensor, Tensor, Tensor]] = align
    gemm1: Callable[[Inputs], Tensor] = gemm1
    act: Callable[[Tensor], Tensor] = act
    gemm2: Callable[[Inputs, Tensor], Tensor] = gemm2
    combine: Callable[[Inputs, Tensor], Tensor] = combine

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        ids, weights = self.route(inputs)
        slots, owners, padded = self.align(inputs)
        gate_up = self.gemm1(inputs)
        h = self.act(gate_up)
        y = self.gemm2(inputs, h)
        shown = {"topk_ids": ids, "topk_weights": weights, "gate_up": gate_up, "h": h, "y": y}
        if slots.numel():
            shown |= {"sorted_slots": slots, "block_expert": owners, "num_padded": padded}
        return shown | {"out": self.combine(inputs, y)}


def candidate(name: str = "plain", **stages: object) -> Candidate:
    """The healthy pipeline, or one with some stages replaced."""
    return Candidate(name, replace(Pipeline(), **stages))  # type: ignore[arg-type]
