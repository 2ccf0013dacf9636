"""Slots: which (token, slot) goes to which local expert. The one place that reads topk_ids and the expert map."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from moeproof.reference.contract.errors import check


@dataclass(frozen=True)
class Slots:
    """Routing of a call. Slot s = t * K + k is live where 0 <= ids[t, k] < num_experts and its expert lives here."""

    ids: torch.Tensor
    """(T, K) int32 or int64, any strides; -1, remote and out-of-range ids are dead slots."""
    num_experts: int
    """Global experts that own weights."""
    num_local: int
    """Experts whose weights are here."""
    expert_map: torch.Tensor | None = None
    """int32 (num_experts,): local index or -1. None = identity."""

    def __post_init__(self) -> None:
        check(self.ids.dim() == 2, f"topk_ids has {self.ids.dim()} dims, must have 2: (tokens, slots)")
        check(self.ids.dtype in (torch.int32, torch.int64), f"topk_ids is {self.ids.dtype}, must be torch.int32 or torch.int64")
        check(self.count < 2**31, f"{self.count} slots; at most 2^31 - 1 are supported")
        if self.expert_map is None:
            check(
                self.num_experts == self.num_local,
                f"{self.num_local} of {self.num_experts} experts are here, but there is no expert_map",
            )
            return
        check(
            self.expert_map.dtype == torch.int32 and self.expert_map.shape == (self.num_experts,),
            f"expert_map is {self.expert_map.dtype} {tuple(self.expert_map.shape)}, must be int32 ({self.num_experts},)",
        )
        object.__setattr__(self, "expert_map", self.expert_map.contiguous())

    @property
    def K(self) -> int:
        return self.ids.size(1)

    @property
    def count(self) -> int:
        return self.ids.numel()

    @property
    def arguments(self) -> tuple[object, ...]:
        """What `local_expert` takes after the slots, in its order."""
        return (self.ids, self.expert_map, *self.ids.stride(), self.num_experts, self.num_local, self.K)


@triton.jit
def load_ids(slot, mask, ids, stride_t, stride_k, K):
    """Global id of each slot, -1 where masked."""
    return tl.load(ids + (slot // K).to(tl.int64) * stride_t + (slot % K).to(tl.int64) * stride_k, mask=mask, other=-1)


@triton.jit
def local_of_id(expert, expert_map, num_experts, num_local):
    """int32 local index of global ids; -1 where the id is -1, out of range or remote."""
    live = (expert >= 0) & (expert < num_experts)
    if expert_map is not None:
        expert = tl.load(expert_map + expert, mask=live, other=-1)
        live = live & (expert >= 0) & (expert < num_local)
    return tl.where(live, expert, -1).to(tl.int32)


@triton.jit
def local_expert(slot, mask, ids, expert_map, stride_t, stride_k, num_experts, num_local, K):
    """int32 local expert of each slot, -1 where the slot is dead or masked."""
    return local_of_id(load_ids(slot, mask, ids, stride_t, stride_k, K), expert_map, num_experts, num_local)


@triton.jit
def _clear_dead(
    y_SH, stride_s, stride_h, num_slots, H,
    ids, expert_map, stride_t, stride_k, num_experts, num_local, K,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    real = slot < num_slots
    local = local_expert(slot, real, ids, expert_map, stride_t, stride_k, num_experts, num_local, K)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dead = (real & (local < 0))[:, None] & (h < H)[None, :]
    at = y_SH + slot.to(tl.int64)[:, None] * stride_s + h.to(tl.int64)[None, :] * stride_h
    tl.store(at, tl.zeros([BLOCK_S, BLOCK_H], y_SH.dtype.element_ty), mask=dead)


def clear_dead(y_SH: torch.Tensor, slots: Slots) -> None:
    """Write zeros into the rows (S, H) of dead slots; live rows are not touched."""
    if not y_SH.numel():
        return
    S, H = y_SH.shape
    block_h = min(triton.next_power_of_2(H), 1024)
    grid = (triton.cdiv(S, 8), triton.cdiv(H, block_h))
    _clear_dead[grid](y_SH, *y_SH.stride(), S, H, *slots.arguments, BLOCK_S=8, BLOCK_H=block_h)
