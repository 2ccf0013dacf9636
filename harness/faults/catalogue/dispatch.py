"""P19-P28: faults of DISPATCH."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.catalogue import scales
from moeproof.harness.faults.catalogue.quantise import quant_fault
from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
MAPS = (Stage.PERMUTE, Stage.DISPATCH)
"""The plan of the standard layout, the counts and rows of the batched one."""

MOVED = (Stage.DISPATCH, Stage.GEMM1)


def _wraps(right: Tensor, _: Any, table: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
    return torch.where(ids < table.numel(), table[ids.clamp(-1, table.numel() - 1)], -1)


def _global_on_local(right: Tensor, _: Any, table: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
    return torch.where(routed & (ids < int((table >= 0).sum())), ids, -1)


def _as_mask(right: Tensor, _: Any, table: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
    mask = table[torch.where(routed, ids, 0)] != 0
    return torch.where(routed & mask, ids % int((table >= 0).sum()), -1)


def _capacity(flat: Tensor, num_experts: int) -> int:
    """The usual factor: a quarter more than an even share of the routed slots."""
    return max(-(-5 * int((flat >= 0).sum()) // (4 * num_experts)), 1)


def _position(right: Tensor, flat: Tensor, starts: Tensor) -> Tensor:
    """Place of each slot inside its expert's rows."""
    return right - starts[flat.clamp(min=0)]


def _truncate(right: Tensor, _: Any, flat: Tensor, starts: Tensor, K: int) -> Tensor:
    if not starts.numel():
        return right
    return torch.where(_position(right, flat, starts) < _capacity(flat, starts.numel()), right, -1)


def _spill(right: Tensor, _: Any, flat: Tensor, starts: Tensor, K: int) -> Tensor:
    if starts.numel() < 2:
        return right
    over = _position(right, flat, starts) - _capacity(flat, starts.numel())
    after = starts.roll(-1)[flat.clamp(min=0)]
    return torch.where((over >= 0) & (right >= 0), after + over, right)


def _first_slot_only(right: Tensor, _: Any, ids: Tensor, inputs: Any) -> Tensor:
    return torch.where(torch.arange(right.shape[1]) == 0, right, -1)


FAULTS = (
    Fault(
        "P19",
        "dispatch.minus_one_wraps",
        "vllm#46408, #42034, #48371",
        "-1 slots and an expert map that ends in a local expert",
        MAPS,
        {"": {"look_up": _wraps}},
    ),
    Fault(
        "P20",
        "dispatch.global_id_local_table",
        "vllm-gaudi#1796, aiter#3995",
        "R > 1, rank > 0",
        MAPS,
        {"": {"look_up": _global_on_local}},
    ),
    Fault("P21", "dispatch.map_as_mask", "ATOM#887", "R > 1", MAPS, {"": {"look_up": _as_mask}}),
    Fault(
        "P22",
        "dispatch.capacity_truncate",
        "vllm-ascend#15640",
        "skew: count above capacity",
        MAPS,
        {"": {"place": _truncate}},
    ),
    Fault(
        "P23",
        "dispatch.capacity_spill",
        "tt-metal#41434, marin#4312",
        "skew; the next expert is not empty",
        MAPS,
        {"": {"place": _spill}},
    ),
    quant_fault(
        "P24",
        "dispatch.scale_left_behind",
        "sglang#31529",
        "quantised dispatch",
        MOVED,
        {
            "scales keep their order": ({"move_scales": scales.scales_stay}, scales.in_x(lambda q: q.by_token)),
            "codes quantised again": ({"requantised": scales.codes_requantised}, scales.in_x(lambda q: True)),
        },
        scales.X_PLAIN,
        note="the standard layout shows no dispatched rows: GEMM1 is the first that goes wrong there",
    ),
    quant_fault(
        "P25",
        "dispatch.layout_after_a2a",
        "vllm#49335",
        "R > 1 and a format whose kernel wants scales in a layout of its own",
        MOVED,
        {"": ({"lay_out": scales.layout_kept}, scales.in_x(scales.grouped))},
        scales.X_PLAIN
        | {"one scale to a row or to x: every layout of it is the same": scales.in_x(lambda q: not scales.grouped(q))},
        note="one rank of an expert-parallel world; the imagined kernel reads scales column by column",
    ),
    Fault(
        "P26",
        "dispatch.tail_ids_garbage",
        "vllm#46432",
        "buffer larger than what came, dirty memory",
        (Stage.DISPATCH,),
        {"": {"tail_experts": lambda right, _, rest, rank, expert: torch.empty_like(right)}},
        ground="world",
    ),
    Fault(
        "P27",
        "dispatch.first_slot_only",
        "vllm-exl3#2",
        "K > 1",
        MAPS,
        {"": {"local_ids": _first_slot_only}},
    ),
    Fault(
        "P28",
        "dispatch.id_out_of_range",
        "vllm#50845",
        "id >= E injected",
        (Stage.COMBINE, None),
        {"": {"in_range": lambda right, _, ids, inputs: torch.ones_like(right)}},
        note="its slots are in no expert's rows, which hides them up to the sum of rows that nobody wrote; with an expert map, "
        "an error of the call",
    ),
)
