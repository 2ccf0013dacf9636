"""P49-P55: faults of ACT."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
ACT = (Stage.ACT,)


def _swapped(right: tuple[Tensor, Tensor], _: Any, x: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    return right[1], right[0]


def _other_packing(right: tuple[Tensor, Tensor], _: Any, x: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    if not act.interleaved:
        return x[..., ::2], x[..., 1::2]
    g, u = x.chunk(2, -1)
    return g, u


def _two_sided(right: tuple[Tensor, Tensor], self: Any, g: Tensor, u: Tensor, act: Any) -> tuple[Tensor, Tensor]:
    return right[0].clamp(min=-self.limit(act)), right[1]


FAULTS = (
    Fault(
        "P49",
        "act.clamp_dropped",
        "tokenspeed#1647, sglang#39939, TensorRT-LLM#13767",
        "pre-activation beyond the limit",
        ACT,
        {"": {"limit": lambda right, _, act: torch.inf}},
    ),
    Fault(
        "P50",
        "act.constants_hardcoded",
        "onnxruntime#28738, ktransformers#1862",
        "an activation with other constants",
        ACT,
        {
            "limit 7": {"limit": lambda right, _, act: 7.0},
            "always +1": {"up": lambda right, _, u, act: right if act.name.startswith("swigluoai") else right + 1.0},
            "never +1": {"up": lambda right, _, u, act: u},
        },
    ),
    Fault("P51", "act.halves_swapped", "Megatron-LM#6045", "always", ACT, {"": {"halves": _swapped}}),
    Fault("P52", "act.interleave_mismatch", "vllm#44893", "always", ACT, {"": {"halves": _other_packing}}),
    Fault(
        "P53",
        "act.kind_ignored",
        "sonic-moe#2",
        "the other kind",
        ACT,
        {
            "silu for all": {"curve": lambda right, _, x, name: x * torch.sigmoid(x)},
            "gated for ungated": {"ungated": lambda right, _, x, act: x * torch.sigmoid(x) * x},
        },
    ),
    Fault(
        "P54",
        "act.width_tail_unwritten",
        "vllm-xpu-kernels#454, 1bit-MONSTER#562",
        "I % vector != 0, I > vector",
        ACT,
        {"": {"act_columns": lambda right, _, width: torch.arange(width // 16 * 16 if width > 16 else width)}},
    ),
    Fault(
        "P55",
        "act.clamp_two_sided",
        "tokenspeed#1647",
        "gate < -limit",
        ACT,
        {"": {"clamp": _two_sided}},
    ),
)
