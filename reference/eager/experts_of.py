"""The experts of this folder that a case needs, and what they keep of a call."""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts
from moeproof.reference.eager.quant_experts import QuantBatchedLoopExperts, QuantLoopExperts


def _quantised(inputs: Inputs) -> tuple[object, ...]:
    """What the constructors of quantised experts take."""
    p = inputs.problem
    a1_scale = inputs.a1_scale if p.quant.a1 is not None and p.quant.a1.two_level else None
    return p.quant, p.act, inputs.b1, inputs.b2, inputs.w1_global, inputs.w2_global, a1_scale


def standard_experts(inputs: Inputs) -> FusedMoEPermuteExpertsUnpermute:
    if inputs.problem.quant.quantised:
        return QuantLoopExperts(*_quantised(inputs))  # type: ignore[arg-type]
    return LoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


def batched_experts(inputs: Inputs) -> FusedMoEPermuteExpertsUnpermute:
    if inputs.problem.quant.quantised:
        return QuantBatchedLoopExperts(*_quantised(inputs))  # type: ignore[arg-type]
    return BatchedLoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


def taps(experts: FusedMoEPermuteExpertsUnpermute) -> dict[str, torch.Tensor]:
    """h, hq and hs of the last `apply` of quantised experts."""
    return experts.taps() if isinstance(experts, (QuantLoopExperts, QuantBatchedLoopExperts)) else {}
