"""Prepare and finalize in two halves each, so that a second micro-batch computes while the first one travels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.modular import FusedMoEModularKernel, FusedMoEPrepareAndFinalize, Prepared

Tensor = torch.Tensor
IN_FLIGHT = 2
"""Micro-batches at once: two slots, as the engines have."""


class Step(str, Enum):
    """Where a micro-batch is. The order of the members is the only legal order."""

    START_PREPARE = "start_prepare"
    FINISH_PREPARE = "finish_prepare"
    START_FINALIZE = "start_finalize"
    FINISH_FINALIZE = "finish_finalize"

    def __str__(self) -> str:
        return self.value


_BEFORE = dict(zip(list(Step)[1:], list(Step), strict=False))


@dataclass
class Batch:
    """Handle of one micro-batch between its four calls."""

    name: str
    step: Step = Step.START_PREPARE
    """The last step that was done."""

    def advance(self, step: Step) -> None:
        """Raises ContractError where `step` does not follow the last one."""
        needed = _BEFORE[step]
        check(
            self.step == needed,
            f"{step} of micro-batch {self.name} after its {self.step}; the order is {', '.join(map(str, Step))}, each once",
        )
        self.step = step


class FusedMoEOverlappedPrepareAndFinalize(FusedMoEPrepareAndFinalize):
    """The four calls take and return what prepare and finalize do. All ranks make the same calls in the same order.

    Legal: of one micro-batch the four in order, of two any interleaving. What finish_prepare returned may be used from then
    on; `output` is written when finish_finalize returns. A third micro-batch before one of two is finished is refused.
    """

    @abstractmethod
    def start_prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Batch: ...

    @abstractmethod
    def finish_prepare(self, batch: Batch) -> Prepared: ...

    @abstractmethod
    def start_finalize(
        self,
        batch: Batch,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None: ...

    @abstractmethod
    def finish_finalize(self, batch: Batch) -> None: ...


class FusedMoEOverlappedKernel(FusedMoEModularKernel):
    """FusedMoEModularKernel whose rank's tokens go through in two halves: one travels while the other is computed.

    Every rank makes two micro-batches, also of no tokens: all ranks make the same calls.
    """

    prepare_finalize: FusedMoEOverlappedPrepareAndFinalize

    def forward(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        inplace: bool = False,
        activation: str = "silu",
        global_num_experts: int = -1,
        expert_map: Tensor | None = None,
        w1_scale: Tensor | None = None,
        w2_scale: Tensor | None = None,
        w1_zp: Tensor | None = None,
        w2_zp: Tensor | None = None,
        a1_scale: Tensor | None = None,
        a2_scale: Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> Tensor:
        """As FusedMoEModularKernel.forward. `a1_scale` is static: it serves both halves."""
        if global_num_experts == -1:
            global_num_experts = w1.size(0)
        pf = self.prepare_finalize
        self.check(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
        )
        half = (hidden_states.size(0) + 1) // 2
        output = hidden_states if inplace else torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        halves = [slice(0, half), slice(half, None)]
        batches = [
            pf.start_prepare(
                hidden_states[rows],
                a1_scale,
                a2_scale,
                topk_weights[rows],
                topk_ids[rows],
                global_num_experts,
                expert_map,
                apply_router_weight_on_input,
            )
            for rows in halves
        ]
        for rows, batch in zip(halves, batches, strict=True):
            prepared = pf.finish_prepare(batch)
            ids = topk_ids[rows] if prepared[3] is None else prepared[3]
            weights = topk_weights[rows] if prepared[4] is None else prepared[4]
            y = self.run_experts(
                prepared,
                hidden_states[rows],
                w1,
                w2,
                ids,
                activation,
                global_num_experts,
                expert_map,
                w1_scale,
                w2_scale,
                w1_zp,
                w2_zp,
                a2_scale,
            )
            pf.start_finalize(batch, output[rows], y, weights, ids, apply_router_weight_on_input)
        for batch in batches:
            pf.finish_finalize(batch)
        return output
