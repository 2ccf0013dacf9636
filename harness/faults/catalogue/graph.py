"""P92-P95: faults of captured graphs."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor


def _baked_grid(right: Tensor, self: Any, name: str, plan: Any) -> Tensor:
    """As many blocks as the capture needed."""
    launched = int(self.frozen(f"grid of {name}", torch.tensor(plan.used // plan.block)))
    return torch.where(torch.arange(right.numel()) < launched, right, -1)


def _freed_temporary(right: Inputs, self: Any, inputs: Inputs) -> Inputs:
    """The weights in a temporary that was freed after the capture, and is someone else's memory now."""
    first = "weights" not in self.memory
    kept = self.frozen("weights", inputs.topk_weights)
    return right if first else right.map({"topk_weights": torch.full_like(kept, 1e4)})


def _flag_still_set(right: Tensor, self: Any, y: Tensor, w: Tensor, start: int) -> Tensor:
    """Half of the rows were not there yet when the flag of the last replay let them pass."""
    before = self.memory.get(("arrived", start))
    self.memory["arrived", start] = y.clone()
    if before is None or before.shape != y.shape:
        return right
    late = torch.where(torch.arange(y.shape[0])[:, None, None] % 2 == 0, y, before)
    total = torch.zeros_like(right)
    for slot in range(y.shape[1]):
        total = total + torch.where(w[:, slot, None] != 0, w[:, slot, None] * late[:, slot].float(), 0.0)
    return torch.where(torch.arange(y.shape[0])[:, None] % 2 == 0, right, total)


def _live_padding(right: Tensor, self: Any, ids: Tensor) -> Tensor:
    """Padding rows hold what an earlier replay left in them."""
    kept = self.frozen("batch", ids.repeat(8, 1)[: right.shape[0]]) if ids.shape[0] else right
    return torch.where(torch.arange(right.shape[0])[:, None] < ids.shape[0], right, kept[: right.shape[0]])


FAULTS = (
    Fault(
        "P92",
        "graph.host_value_baked",
        "imp#238, FreeToken#350",
        "replay with other routing",
        (Stage.GEMM1,),
        {"": {"owners": _baked_grid}},
        ground="replay",
        on_gpu=("ids",),
    ),
    Fault(
        "P93",
        "graph.temporary_freed",
        "vllm#40038, flashinfer#4238, #5287",
        "churn between capture and replay",
        (Stage.COMBINE, Stage.GEMM1, Stage.DISPATCH),
        {"": {"admit": _freed_temporary}},
        ground="replay",
        on_gpu=("table read", "workspace written"),
        note="the weights enter where the problem applies them: at the end, or on the input",
    ),
    Fault(
        "P94",
        "graph.flag_not_reset",
        "DeepGEMM#451",
        "second replay, changed input",
        (Stage.COMBINE,),
        {"": {"sum_slots": _flag_still_set}},
        ground="replay",
        on_gpu=("host reset",),
    ),
    Fault(
        "P95",
        "graph.padding_rows_live",
        "vllm#39593",
        "fewer tokens than captured",
        (Stage.DISPATCH,),
        {"": {"pad_tokens": _live_padding}},
        ground="replay",
        note="the ids of padding rows are no shown tensor: the counts are the first that goes wrong",
    ),
)
