"""transformers' grouped_mm experts with the usual five arguments, exactly as a user would plug them in.

    moeproof verify docs/examples/transformers_experts.py:grouped_mm --case "T=33,H=64,I=48,E=8,K=2,seed=1"
    moeproof verify docs/examples/transformers_experts.py:grouped_mm --case "T=33,H=64,I=48,E=8,K=2,routing=minus1,seed=1"

The first passes. The second marks slots as not routed by the id -1, as vLLM and DeepEP do, and fails: docs/plugging-in.md.
"""

from __future__ import annotations

import torch
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moeproof.reference.contract import Candidate, Claims
from moeproof.reference.contract.inputs import Inputs


def experts(
    hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    config = MixtralConfig(
        hidden_size=hidden_states.shape[1], intermediate_size=w2.shape[2], num_local_experts=w1.shape[0], hidden_act="silu"
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    module.gate_up_proj = torch.nn.Parameter(w1.contiguous(), requires_grad=False)
    module.down_proj = torch.nn.Parameter(w2.contiguous(), requires_grad=False)
    with torch.no_grad():
        return module(hidden_states.contiguous(), topk_ids.long(), topk_weights)


def _run(inputs: Inputs) -> torch.Tensor:
    return experts(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)


# The function alone would do; named as a Candidate it can say that its activation rounds after every operation.
grouped_mm = Candidate("transformers-grouped_mm", _run, claims=Claims(activation="dtype"))
