"""DISPATCH and PERMUTE of the plain pipeline: which slot stands in which row, and which expert a block of rows belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor


@dataclass(frozen=True)
class Plan:
    """Rows of a grouped GEMM. A row whose slot is `slots_total` or above is padding."""

    slots: Tensor
    """int64 (P,): slot t * K + k of each row."""
    blocks: Tensor
    """int64 (B,): local expert of each block of `block` rows, -1 past the last one."""
    used: int
    """Rows that count; a multiple of `block`."""
    block: int
    slots_total: int
    counts: Tensor
    """int64 (e,): rows of each expert, without padding."""


class PermuteSteps:
    """ids (T, K) -> Plan."""

    def local_ids(self, ids: Tensor, inputs: Inputs) -> Tensor:
        """int64, like ids: index into w1, or -1 where not routed, remote or an identity expert."""
        routed = (ids >= 0) & self.in_range(ids, inputs)
        if inputs.expert_map is None:
            return torch.where(routed, ids.long(), -1)
        return self.look_up(inputs.expert_map.long(), ids.long(), routed)

    def in_range(self, ids: Tensor, inputs: Inputs) -> Tensor:
        return ids < self.num_experts(inputs)

    def num_experts(self, inputs: Inputs) -> int:
        """Experts of all ranks that have weights, fused shared ones included."""
        return inputs.problem.E + inputs.problem.router.fused_shared

    def look_up(self, table: Tensor, ids: Tensor, routed: Tensor) -> Tensor:
        """The map holds -1 for remote experts, and must never be indexed by -1."""
        return torch.where(routed, table[torch.where(routed, ids, 0)], -1)

    def pad_tokens(self, ids: Tensor) -> Tensor:
        """Token rows are padded to whole groups of 8, as a captured batch is. Padding is not routed."""
        more = -ids.shape[0] % 8
        return torch.cat([ids, torch.full((more, ids.shape[1]), -1, dtype=ids.dtype)])

    def plan(self, local: Tensor, num_local: int, block: int, region: int = 0) -> Plan:
        """Slots sorted by expert. `region` rows per expert where given (batched), else counts padded to blocks."""
        flat = local.flatten()
        counts = self.count(flat, num_local)
        padded = torch.full_like(counts, region) if region else self.pad(counts, block)
        starts = self.scan(padded)
        used = int(padded.sum())
        # Sized for the worst case, as a launch without a look at the device's counts must.
        size = used if region else flat.numel() + num_local * (block - 1) + block
        size += -size % block if size else 0
        slots, blocks = torch.full((size,), flat.numel()), torch.full((size // block if size else 0,), -1)
        rows = self.place(flat, starts, local.shape[1])
        inside = (flat >= 0) & (rows >= 0) & (rows < size)
        slots[rows[inside]] = self.slot_entries(flat)[inside]
        owners = self.block_owners(padded, block)[: blocks.numel()]
        blocks[: owners.numel()] = owners
        if not region:
            # Slots of no expert here stand behind the others, in blocks labelled -1.
            dead = (flat < 0).nonzero().flatten()[: size - used]
            slots[used : used + dead.numel()] = dead
        slots, blocks, used = self.tail(slots, blocks, used, block)
        return Plan(slots, blocks, used, block, flat.numel(), counts)

    def count(self, flat: Tensor, num_local: int) -> Tensor:
        return torch.bincount(flat[(flat >= 0) & (flat < num_local)], minlength=num_local)

    def pad(self, counts: Tensor, block: int) -> Tensor:
        return (counts + block - 1) // block * block

    def scan(self, padded: Tensor) -> Tensor:
        """Exclusive prefix sum: first row of each expert."""
        return padded.cumsum(0) - padded

    def place(self, flat: Tensor, starts: Tensor, slots_per_token: int) -> Tensor:
        """Row of each slot; -1 where it is not live. Inside an expert, rows come in slot order."""
        rows = torch.full_like(flat, -1)
        for expert in range(starts.numel()):
            mine = (flat == expert).nonzero().flatten()
            rows[mine] = starts[expert] + torch.arange(mine.numel())
        return rows

    def slot_entries(self, flat: Tensor) -> Tensor:
        """What is written at a slot's row: its own number."""
        return torch.arange(flat.numel())

    def block_owners(self, padded: Tensor, block: int) -> Tensor:
        """Local expert of each block."""
        return torch.arange(padded.numel()).repeat_interleave(padded // block)

    def tail(self, slots: Tensor, blocks: Tensor, used: int, block: int) -> tuple[Tensor, Tensor, int]:
        """What lies behind the last used row: already cleared, nothing to do."""
        return slots, blocks, used

    def token_of(self, slots: Tensor, slots_per_token: int) -> Tensor:
        """Token whose row a slot reads."""
        return slots // slots_per_token
