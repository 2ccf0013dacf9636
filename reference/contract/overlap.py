"""Prepare and finalize in two halves each, so that a second micro-batch computes while the first one travels."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.modular import FusedMoEPrepareAndFinalize

Tensor = torch.Tensor
Prepared = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""What `prepare` returns: (a1q, a1q_scale, expert_num_tokens, expert_topk_ids, expert_topk_weights)."""
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
