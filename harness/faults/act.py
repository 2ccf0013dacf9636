"""ACT of the plain pipeline, in float32, rounded once."""

from __future__ import annotations

import torch

from moeproof.reference.contract.activations import Activation

Tensor = torch.Tensor


class ActSteps:
    def activate(self, gate_up: Tensor, act: Activation) -> Tensor:
        """(R, N) -> (R, I), in the dtype of gate_up."""
        x = gate_up.float()
        if not act.gated:
            value = self.ungated(x, act)
        else:
            g, u = self.halves(x, act)
            g, u = self.clamp(g, u, act)
            value = self.gate(g, act) * self.up(u, act)
        h = torch.empty_like(value, dtype=gate_up.dtype)
        columns = self.act_columns(value.shape[-1])
        h[..., columns] = value[..., columns].to(h.dtype)
        return h

    def halves(self, x: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
        if act.interleaved:
            return x[..., ::2], x[..., 1::2]
        g, u = x.chunk(2, dim=-1)
        return g, u

    def limit(self, act: Activation) -> float:
        """Clamp of the pre-activations; infinite where there is none."""
        return act.limit or torch.inf

    def clamp(self, g: Tensor, u: Tensor, act: Activation) -> tuple[Tensor, Tensor]:
        """The gate from above only, up from both sides; swiglustep clamps after its silu."""
        top = self.limit(act)
        if act.name == "swiglustep":
            return g, u.clamp(-top, top)
        return g.clamp(max=top), u.clamp(-top, top)

    def gate(self, g: Tensor, act: Activation) -> Tensor:
        if act.name.startswith("swigluoai"):
            return g * torch.sigmoid(self.alpha(act) * g)
        if act.name == "swiglustep":
            return (g * torch.sigmoid(g)).clamp(max=self.limit(act))
        if act.name == "situ":
            assert act.beta
            return act.beta * torch.tanh(g / act.beta) * torch.sigmoid(g)
        return self.curve(g, act.name)

    def alpha(self, act: Activation) -> float:
        assert act.alpha is not None
        return act.alpha

    def up(self, u: Tensor, act: Activation) -> Tensor:
        if act.name.startswith("swigluoai"):
            return u + (act.beta or 0.0)
        if act.name == "situ" and act.linear_beta:
            return act.linear_beta * torch.tanh(u / act.linear_beta)
        return u

    def ungated(self, x: Tensor, act: Activation) -> Tensor:
        return self.curve(x, act.name.removesuffix("_no_mul"))

    def curve(self, x: Tensor, name: str) -> Tensor:
        if name == "silu":
            return x * torch.sigmoid(x)
        if name == "gelu":
            return torch.nn.functional.gelu(x)
        if name == "gelu_tanh":
            return torch.nn.functional.gelu(x, approximate="tanh")
        return x.relu() ** 2 if name == "relu2" else x.relu()

    def act_columns(self, width: int) -> Tensor:
        """Columns that some vector of the kernel covers: all."""
        return torch.arange(width)
