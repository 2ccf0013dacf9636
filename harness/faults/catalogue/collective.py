"""P78-P83: faults of collectives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.ranks import CHUNK, rounds_of
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
HANGS = (Stage.DISPATCH, Stage.COMBINE)
LEAST = 13
WHY_LEAST = f"{LEAST} tokens are the first of which the uneven split (5 : 2 : 1) gives a rank more than a chunk of {CHUNK}"


def _idle_skips(late: bool) -> Any:
    def wrong(right: list[str], _: Any, sizes: Sequence[int], rank: int, step: int) -> list[str]:
        return [] if not sizes[rank] and (step == 2 or not late) else right

    return wrong


def _dirty_padding(right: Tensor, _: Any, ids: Tensor, longest: int, inputs: Any) -> Tensor:
    return torch.cat([ids, torch.empty_like(right[ids.shape[0] :])])


def _slot_reused(right: Any, _: Any, message: Any) -> Any:
    """The slow peer reads the first half of the batch after the second half was staged over it."""
    half = message.rows.shape[0] // 2
    rows = torch.cat([message.rows[half : 2 * half], message.rows[half:]])
    return replace(message, rows=rows)


def _weight_late(right: Tensor, self: Any, weight: Tensor) -> Tensor:
    """The flag of a row is visible before its routing weight: the stale 0 is taken."""
    late = torch.tensor([self.dice() for _ in range(weight.numel())], dtype=torch.bool)
    return torch.where(late, 0.0, weight)


FAULTS = (
    Fault(
        "P78",
        "coll.idle_rank_skips",
        "vllm#43547, DeepEP#374, PaddleFormers#3010",
        "a rank without tokens",
        HANGS,
        {"always": {"collectives": _idle_skips(False)}, "at the third step": {"collectives": _idle_skips(True)}},
        ground="ranks",
    ),
    Fault(
        "P79",
        "coll.local_decision",
        "TensorRT-LLM#6173, vllm#25906",
        "ranks on both sides of the threshold",
        HANGS,
        {"": {"algorithm": lambda right, _, sizes, rank: "dispatch" if sizes[rank] > CHUNK else "gather"}},
        ground="ranks",
        least=LEAST,
        note=WHY_LEAST,
    ),
    Fault(
        "P80",
        "coll.local_chunks",
        "vllm#21963, DeepSpeed#6809, prime-rl#3411",
        "uneven ranks around a multiple of the chunk",
        HANGS,
        {"": {"rounds": lambda right, _, sizes, rank: rounds_of(sizes[rank])}},
        ground="ranks",
        least=LEAST,
        note=WHY_LEAST,
    ),
    Fault(
        "P81",
        "coll.publish_before_payload",
        "flashinfer#4092",
        "timing",
        (Stage.COMBINE,),
        {"": {"arrived_weights": _weight_late}},
        ground="world",
        random=True,
        note="the late field is the routing weight, which the sum reads",
    ),
    Fault(
        "P82",
        "coll.single_slot_reuse",
        "tokenspeed#1356",
        "back-to-back micro-batches, a delayed peer",
        (Stage.DISPATCH,),
        {"": {"read_staged": _slot_reused}},
        ground="world",
    ),
    Fault(
        "P83",
        "coll.padding_uninitialised",
        "ATOM#1229",
        "uneven ranks and dirty memory",
        (Stage.DISPATCH,),
        {"": {"equalise": _dirty_padding}},
        ground="world",
    ),
)
