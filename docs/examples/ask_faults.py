"""Would this suite have caught it? A team's own test, asked about every public fault that a plain layer can have.

    python docs/examples/ask_faults.py
    moeproof faults --ask docs/examples/ask_faults.py:check_moe

The test is of the usual kind: aligned sizes, normal inputs, a loop over experts, a flat allclose.
"""

from __future__ import annotations

import torch

from moeproof.harness.faults import ask


def reference(
    hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor
) -> torch.Tensor:
    """A loop over experts in float32."""
    x = hidden_states.float()
    out = torch.zeros_like(x)
    for e in range(w1.shape[0]):
        token, slot = (topk_ids == e).nonzero(as_tuple=True)
        gate, up = (x[token] @ w1[e].float().T).chunk(2, dim=-1)
        y = (torch.nn.functional.silu(gate) * up) @ w2[e].float().T
        out.index_add_(0, token, y * topk_weights[token, slot, None])
    return out


def check_moe(moe) -> None:
    """The team's test: raises AssertionError where it rejects the layer."""
    torch.manual_seed(0)
    T, H, I, E, K = 64, 128, 64, 8, 2  # noqa: E741
    x = torch.randn(T, H, dtype=torch.bfloat16) / 10
    w1 = torch.randn(E, 2 * I, H, dtype=torch.bfloat16) / 10
    w2 = torch.randn(E, H, I, dtype=torch.bfloat16) / 10
    topk_weights, topk_ids = torch.randn(T, E).softmax(-1).topk(K)
    args = (x, w1, w2, topk_weights, topk_ids.int())
    torch.testing.assert_close(moe(*args).float(), reference(*args), rtol=2e-2, atol=2e-2)


if __name__ == "__main__":
    for answer in ask(check_moe):
        if not answer.caught:
            print(answer)
