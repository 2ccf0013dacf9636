"""A rank's experts by themselves: the pairs it received as tokens of one slot each, whoever sent them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.router import Router
from moeproof.reference.ranks.dispatch import Pair

Tensor = torch.Tensor
_PLAIN = {
    "router": Router(),
    "weight_on_input": False,
    "shared": 0,
    "shared_gate": False,
    "scale_on_sum": 1.0,
    "layout": "standard",
    "capacity": 0,
}
"""What is no business of the experts: it happened before, or comes later."""


def alone(inputs: Inputs, pairs: Sequence[Pair], rows: Tensor) -> Inputs:
    """`inputs` of a rank -> a layer of its experts and shard whose tokens are `rows` (n, H), the inputs of `pairs`.

    With quantised activations `rows` only stand for the tokens: the operand is given beside them.
    """
    n, p = len(pairs), inputs.problem
    ids = torch.tensor([[pair.expert] for pair in pairs], dtype=torch.int32, device=rows.device).view(n, 1)
    single = replace(p, T=n, K=1, E=p.weight_experts, **_PLAIN)  # type: ignore[arg-type]
    change = {"hidden_states": rows, "topk_ids": ids, "topk_weights": torch.ones(n, 1, device=rows.device)}
    return replace(inputs.map(change), problem=single, logits=None)
