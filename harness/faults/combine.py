"""COMBINE of the plain pipeline: weigh, sum over slots, scale, shared and identity terms, round once."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.harness.faults.act import ActSteps
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
CHUNK = 16
"""Tokens that one pass of the reduction works on."""
BLOCK = 16
"""Columns of one program of the reduction."""


def _write(out: Tensor, total: Tensor, columns: Tensor) -> None:
    out[:, columns] = total.to(out.dtype)[:, columns]


class CombineSteps(ActSteps):
    def combine(self, inputs: Inputs, y: Tensor, weights: Tensor) -> Tensor:
        """y (T, K, H') unweighted, weights (T, K) as they arrived -> out (T, H)."""
        p, x = inputs.problem, inputs.hidden_states
        # An id that no expert has is as good as -1: its weight may hold anything.
        ids = torch.where(inputs.topk_ids < max(p.routed_ids, p.weight_experts), inputs.topk_ids, -1)
        w = self.slot_weights(weights, ids, p.weight_on_input)
        parts = [self.sum_slots(*self.chunk(y, w, start, min(start + CHUNK, p.T)), start) for start in range(0, p.T, CHUNK)]
        total = torch.cat(parts) if parts else torch.zeros(0, p.hidden)
        if p.router.zero_experts:
            identity = (inputs.topk_ids >= p.E) & (inputs.topk_ids < p.routed_ids)
            total = total + torch.where(identity, weights, 0.0).sum(1, keepdim=True) * x.float()
        total = self.scale_sum(total, p.scale_on_sum)
        if p.latent:
            total = self.out_of_latent(inputs, total)
        if p.shared:
            shared = self.shared_expert(inputs)
            for rank in range(self.num_ranks()):
                if self.adds_shared(rank):
                    total = total + shared
        total = self.final_reduce(total)
        out = self.output(inputs)
        columns = self.hidden_columns(p.H)
        queues: dict[str, list[Callable[[], None]]] = {"default": [], "caller": []}
        queues[self.stream()].append(lambda: _write(out, total, columns))
        for launched in queues["caller"]:  # the caller waits for its own stream, and reads
            launched()
        return out

    def stream(self) -> str:
        """Where the last kernel is launched: on the stream that the caller waits for."""
        return "caller"

    def num_ranks(self) -> int:
        return 1

    def adds_shared(self, rank: int) -> bool:
        """A replicated shared expert enters the sum once."""
        return rank == 0

    def final_reduce(self, total: Tensor) -> Tensor:
        """The sum is complete."""
        return total

    def slot_weights(self, weights: Tensor, ids: Tensor, on_input: bool) -> Tensor:
        """float32 (T, K): 0 for what is not routed, whatever its weight is; 1 where the input was weighted."""
        return torch.where(ids >= 0, torch.ones_like(weights) if on_input else weights, 0.0)

    def chunk(self, y: Tensor, w: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The rows of tokens start..stop."""
        return y[start:stop], w[start:stop]

    def sum_slots(self, y: Tensor, w: Tensor, start: int) -> Tensor:
        """float32 (rows, H'): in slot order."""
        total = torch.zeros(y.shape[0], y.shape[2])
        for slot in self.slot_order(y.shape[1]):
            total = self.add(total, w[:, slot, None] * y[:, slot].float(), y.dtype)
        return total

    def slot_order(self, K: int) -> list[int]:
        return list(range(K))

    def add(self, total: Tensor, term: Tensor, dtype: torch.dtype) -> Tensor:
        return total + term

    def scale_sum(self, total: Tensor, scale: float) -> Tensor:
        return total * scale

    def shared_expert(self, inputs: Inputs) -> Tensor:
        """float32 (T, H): the dense expert of the layer's input, times its gate."""
        assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
        x = self.residual(inputs)
        h = self.activate((x.float() @ inputs.shared_w1.float().T).to(x.dtype), inputs.problem.act)
        y = (h.float() @ inputs.shared_w2.float().T).to(x.dtype).float()
        if inputs.shared_gate is not None:
            y = y * torch.sigmoid(x.float() @ inputs.shared_gate.float())[:, None]
        return y

    def residual(self, inputs: Inputs) -> Tensor:
        """What the shared expert reads: the layer's input as it came."""
        return inputs.hidden_states

    def out_of_latent(self, inputs: Inputs, total: Tensor) -> Tensor:
        """RMSNorm where the model has one, then the up-projection."""
        assert inputs.latent_up is not None
        dtype = inputs.hidden_states.dtype
        total = total.to(dtype)
        if inputs.latent_norm is not None:
            f = total.float()
            total = (f * torch.rsqrt(f.square().mean(1, keepdim=True) + 1e-6) * inputs.latent_norm.float()).to(dtype)
        return total.float() @ inputs.latent_up.float().T

    def output(self, inputs: Inputs) -> Tensor:
        """Where the result goes: fresh memory, or the input itself."""
        return inputs.hidden_states if inputs.problem.inplace else torch.empty_like(inputs.hidden_states)

    def hidden_columns(self, H: int) -> Tensor:
        """Columns that some program covers: whole blocks and the rest."""
        return torch.arange(H)
