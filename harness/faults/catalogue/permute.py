"""P29-P37: faults of PERMUTE."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.catalogue.dispatch import MAPS
from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor


def _first_copy_only(right: Tensor, _: Any, flat: Tensor, starts: Tensor, K: int) -> Tensor:
    ids = flat.view(-1, K)
    seen = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    return torch.where(seen.flatten(), -1, right)


def _owner_of_first_row(right: Tensor, _: Any, padded: Tensor, block: int) -> Tensor:
    ends = padded.cumsum(0)
    first = torch.arange(-(-int(padded.sum()) // block)) * block
    return torch.searchsorted(ends, first, right=True).clamp(max=padded.numel() - 1)


def _power_of_two_only(right: Tensor, _: Any, padded: Tensor) -> Tensor:
    width = 1 << (padded.numel().bit_length() - 1)
    return torch.where(torch.arange(right.numel()) < width, right, 0)


def _stale_block(right: Any, _: Any, slots: Tensor, blocks: Tensor, used: int, block: int) -> Any:
    """One block too many, and what the memory of both maps held there."""
    if used + block > slots.numel():
        return right
    slots, blocks = slots.clone(), blocks.clone()
    slots[used : used + block] = torch.empty_like(slots[used : used + block])
    blocks[used // block] = torch.empty_like(blocks[:1])[0]
    return slots, blocks, used + block


def _tail_chunk_too_large(right: Tensor, _: Any, flat: Tensor) -> Tensor:
    tail = torch.arange(flat.numel()) >= flat.numel() // 32 * 32
    return torch.where(tail & (flat > 0), right + 1, right)


def _stale_prefix(right: Tensor, self: Any, padded: Tensor) -> Tensor:
    out = right.clone()
    for expert in range(1, out.numel()):
        if self.dice():
            out[expert] = right[expert - 1]
    return out


def _padding_summed(right: Tensor, _: Any, t: Tensor, plan: Any, num_slots: int) -> Tensor:
    """The rows of a region behind its last slot carry no slot; here they carry slot 0."""
    extra = (plan.slots >= num_slots).nonzero().flatten()
    out = right.clone()
    if extra.numel() and num_slots:
        out[0] = out[0] + t[extra[-1]]
    return out


FAULTS = (
    Fault(
        "P29",
        "permute.duplicate_break",
        "flashinfer#3011, llama.cpp#24591",
        "duplicate ids in a row",
        MAPS,
        {"": {"place": _first_copy_only}},
    ),
    Fault(
        "P30",
        "permute.align_mismatch",
        "DeepGEMM#450, #15, TileOPs#1952",
        "a count that is not a multiple of the block",
        (Stage.PERMUTE,),
        {
            "": {
                "pad": lambda right, _, counts, block: -(-counts // (block // 2)) * (block // 2),
                "block_owners": _owner_of_first_row,
            }
        },
    ),
    Fault(
        "P31",
        "permute.double_divide",
        "flashinfer#2629",
        "K > 1",
        (Stage.GEMM1, Stage.DISPATCH),
        {"": {"token_of": lambda right, _, slots, K: right // K}},
        note="the row-to-token map is no shown tensor: gate_up (standard) or rows (batched) is the first that goes wrong",
    ),
    Fault(
        "P32",
        "permute.extra_ids_dropped",
        "vllm#51632",
        "fused shared experts",
        MAPS,
        {"": {"num_experts": lambda right, _, inputs: inputs.problem.E}},
    ),
    Fault(
        "P33",
        "permute.scan_width",
        "sglang#8457, TileGym#24",
        "E not a power of two",
        MAPS,
        {"": {"scan": _power_of_two_only}},
    ),
    Fault(
        "P34",
        "permute.tail_block_garbage",
        "sglang#30245, aiter#2478",
        "dirty memory",
        MAPS,
        {"": {"tail": _stale_block}},
    ),
    Fault(
        "P35",
        "permute.count_dependent_index",
        "tt-metal#50669, vllm#17932",
        "T * K not a multiple of the chunk (32)",
        MAPS,
        {"": {"slot_entries": _tail_chunk_too_large}},
    ),
    Fault(
        "P36",
        "permute.missing_barrier",
        "sglang#37663",
        "timing",
        MAPS,
        {"": {"scan": _stale_prefix}},
        random=True,
    ),
    Fault(
        "P37",
        "permute.oversized_buffer_rows",
        "torchtitan#1237",
        "more rows in the buffer than were routed",
        (Stage.GEMM1,),
        {"": {"to_slots": _padding_summed}},
        note="the summed rows belong to no slot; gate_up is the first shown tensor they reach",
    ),
)
