"""P96-P100: faults of configuration."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.catalogue.dispatch import MAPS
from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
LAUNCH_LIMIT = 32
"""Blocks of one launch on the device that these pipelines imagine; 65,535 on a real one."""
TUNED_WIDTH = 96
"""The N that the imagined tuning file has an entry for."""


def _empty_grid(right: Any, _: Any, inputs: Any) -> Any:
    if not bool((inputs.topk_ids >= 0).any()):
        raise RuntimeError("launch with an empty grid")
    return right


def _truncated(right: Tensor, _: Any, name: str, plan: Any) -> Tensor:
    return torch.where(torch.arange(right.numel()) < LAUNCH_LIMIT, right, -1)


def _tuned(right: Tensor, _: Any, name: str, width: int, tile: Any) -> Tensor:
    return right[: -tile.N] if name == "gemm1" and width == TUNED_WIDTH else right


FAULTS = (
    Fault(
        "P96",
        "config.cache_key",
        "flashinfer#4361, b12x#273",
        "two activations with equal shapes in one process",
        (Stage.ACT,),
        {"": {"cache_key": lambda right, _, act, N: (act.gated, N)}},
        ground="sequence",
    ),
    Fault(
        "P97",
        "config.empty_batch",
        "sglang#38773, pytorch#192497",
        "no tokens, or no valid route at all",
        (None,),
        {"": {"admit": _empty_grid}},
        note="shows as an error of the call",
    ),
    Fault(
        "P98",
        "config.grid_limit",
        "vllm#43599",
        "more blocks than one launch holds",
        (Stage.GEMM1,),
        {"": {"owners": _truncated}},
        note=f"scaled down: the imagined device launches {LAUNCH_LIMIT} blocks at once. As experts shrink before tokens, 34 of "
        "them are left, and 15 tokens of 6 slots are what reaches 33 of 34",
        least=15,
    ),
    Fault(
        "P99",
        "config.shape_from_wrong_dim",
        "vllm#36026",
        "N < E, or identity experts",
        (*MAPS, Stage.COMBINE),
        {"": {"num_experts": lambda right, _, inputs: inputs.w1.shape[1]}},
        note="ids of identity experts that pass for routed ones are of no live slot: the sum is the first to read their rows",
    ),
    Fault(
        "P100",
        "config.tuned_tile_untested",
        "aiter#4398, kernels-community#1153",
        f"N = {TUNED_WIDTH}, which a tuning file names",
        (Stage.GEMM1,),
        {"": {"columns": _tuned}},
    ),
)
