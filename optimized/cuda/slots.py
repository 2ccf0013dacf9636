"""The arguments of a kernel that reads `Slots`."""

from __future__ import annotations

import torch

from moeproof.optimized.cuda import library
from moeproof.optimized.slots import Slots

NO_SLOTS: dict[str, library.Argument] = {
    "ids": None,
    "wide": 0,
    "expert_map": None,
    "stride_t": 0,
    "stride_k": 0,
    "num_experts": 0,
    "num_local": 0,
    "K": 1,
}
"""Every row is live."""


def slot_arguments(slots: Slots) -> dict[str, library.Argument]:
    """SLOT_PARAMETERS of slots.cuh, by name."""
    stride_t, stride_k = slots.ids.stride()
    return {
        "ids": slots.ids,
        "wide": slots.ids.dtype == torch.int64,
        "expert_map": slots.expert_map,
        "stride_t": stride_t,
        "stride_k": stride_k,
        "num_experts": slots.num_experts,
        "num_local": slots.num_local,
        "K": slots.K,
    }
