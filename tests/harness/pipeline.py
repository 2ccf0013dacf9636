"""A plain float32 MoE pipeline with every stage shown, into which tests plant faults by replacing one stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeproof.reference.contract import Candidate, Inputs

Tensor = torch.Tensor


def route(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """softmax, stable top-k, renormalise."""
    assert inputs.logits is not None
    scores = inputs.logits.softmax(dim=-1)
    ids = scores.argsort(dim=-1, descending=True, stable=True)[:, : inputs.problem.K]
    weights = scores.gather(1, ids)
    return ids.int(), weights / weights.sum(dim=-1, keepdim=True)


def align(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert, padded to blocks of 4."""
    flat = inputs.topk_ids.flatten()
    slots, owners = [], []
    for expert in range(inputs.w1.shape[0]):
        mine = (flat == expert).nonzero().flatten().tolist()
        mine += [flat.numel()] * (-len(mine) % 4)
        slots += mine
        owners += [expert] * (len(mine) // 4)
    return torch.tensor(slots, dtype=torch.int32), torch.tensor(owners, dtype=torch.int32), torch.tensor([len(slots)])


def gemm(rows: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """(T, K, A) x (e, B, A) -> (T, K, B) in the dtype of rows; dead slots are left as they are made."""
    out = torch.zeros(*ids.shape, w.shape[1], dtype=rows.dtype)
    for expert in range(w.shape[0]):
        t, k = torch.nonzero(ids == expert, as_tuple=True)
        out[t, k] = (rows[t, k].float() @ w[expert].float().T).to(rows.dtype)
    return out


def act(gate_up: Tensor) -> Tensor:
    g, u = gate_up.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(g) * u).to(gate_up.dtype)


def gemm1(inputs: Inputs) -> Tensor:
    T, K = inputs.topk_ids.shape
    return gemm(inputs.hidden_states[:, None].expand(T, K, -1), inputs.w1, inputs.topk_ids)


def gemm2(inputs: Inputs, h: Tensor) -> Tensor:
    return gemm(h, inputs.w2, inputs.topk_ids)


def combine(inputs: Inputs, y: Tensor) -> Tensor:
    live = (inputs.topk_ids >= 0)[:, :, None]
    weighted = torch.where(live, inputs.topk_weights[:, :, None] * y.float(), 0.0)
    return weighted.sum(dim=1).to(y.dtype)


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
