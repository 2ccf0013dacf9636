"""What a user has: a right kernel in a file of their own, and the command line."""

from __future__ import annotations

import sys

import pytest

from moeproof.harness import cli

KERNEL = """
import torch

def moe(hidden_states, w1, w2, topk_weights, topk_ids):
    out = torch.zeros(hidden_states.shape)
    for e in range(w1.shape[0]):
        t, k = torch.nonzero(topk_ids == e, as_tuple=True)
        g, u = (hidden_states[t].float() @ w1[e].float().T).chunk(2, -1)
        y = (torch.nn.functional.silu(g) * u) @ w2[e].float().T
        out.index_add_(0, t, y * topk_weights[t, k, None])
    return out.to(hidden_states.dtype)
"""


def moeproof(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["moeproof", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
