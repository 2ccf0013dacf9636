"""The same layer with other tokens: some of them, in another order, or several times."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
PER_TOKEN = ("hidden_states", "topk_ids", "topk_weights", "logits", "table_ids")
"""Tensors whose first dim is the token."""


def tokens_at(inputs: Inputs, index: Tensor) -> Inputs:
    """Inputs whose token i is token index[i] of these."""
    changed = {name: t[index] for name, t in inputs.tensors() if name in PER_TOKEN}
    return replace(inputs, problem=replace(inputs.problem, T=int(index.numel())), **changed)
