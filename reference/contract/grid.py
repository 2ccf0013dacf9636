"""How the ranks of a world share the experts: an expert-parallel by tensor-parallel grid, and replicas of experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.placement import PLACEMENTS, local_experts

MAX_RANKS = 64


@dataclass(frozen=True)
class Grid:
    """Rank r is tensor-parallel shard `r mod tp` of the experts of expert-parallel group `r // tp`.

    Ids are physical: 0 .. logical-1 are the experts themselves, logical + j is a further replica of expert j mod logical.
    With redundant=0 physical and logical ids are the same. Example, ranks=4, tp=2, logical=3: experts 0 and 1 live on ranks
    0 and 1 (half of I each), expert 2 on ranks 2 and 3.
    """

    logical: int
    ranks: int = 1
    tp: int = 1
    redundant: int = 0
    placement: str = "linear"

    def __post_init__(self) -> None:
        known("placement", self.placement, PLACEMENTS)
        check(1 <= self.ranks <= MAX_RANKS, f"ranks={self.ranks} must be in [1, {MAX_RANKS}]")
        check(self.tp >= 1 and self.ranks % self.tp == 0, f"tp={self.tp} must divide ranks={self.ranks}")
        check(self.redundant >= 0, f"redundant={self.redundant} must not be negative")
        check(
            self.ep <= self.experts,
            f"ranks={self.ranks} with tp={self.tp} make {self.ep} groups, but there are {self.experts} experts to share",
        )

    @property
    def ep(self) -> int:
        """Expert-parallel groups."""
        return self.ranks // self.tp

    @property
    def experts(self) -> int:
        """Physical experts: the length of an expert map."""
        return self.logical + self.redundant

    def ep_rank(self, rank: int) -> int:
        return rank // self.tp

    def tp_rank(self, rank: int) -> int:
        return rank % self.tp

    def local(self, rank: int) -> list[int]:
        """Physical ids whose weights (or shard of them) `rank` holds, in local order."""
        return local_experts(self.experts, self.ep, self.ep_rank(rank), self.placement)

    def holders(self, expert: int) -> list[int]:
        """Ranks that hold `expert`: the tp shards of one group. All of them must see its tokens."""
        group = next(g for g in range(self.ep) if expert in local_experts(self.experts, self.ep, g, self.placement))
        return [group * self.tp + shard for shard in range(self.tp)]

    def group_of(self) -> torch.Tensor:
        """int64 (experts,): expert-parallel group of each physical expert."""
        groups = torch.empty(self.experts, dtype=torch.int64)
        for group in range(self.ep):
            groups[local_experts(self.experts, self.ep, group, self.placement)] = group
        return groups

    def expert_map(self, rank: int) -> torch.Tensor | None:
        """int32 (experts,): local index on `rank`, -1 elsewhere; None where one group holds everything."""
        if self.ep == 1:
            return None
        mapping = torch.full((self.experts,), -1, dtype=torch.int32)
        mapping[self.local(rank)] = torch.arange(len(self.local(rank)), dtype=torch.int32)
        return mapping

    def replicas(self, expert: int) -> list[int]:
        """Physical ids of a logical expert, itself first."""
        return [expert, *range(self.logical + expert, self.experts, self.logical)]

    def logical_of(self, physical: int) -> int:
        return physical % self.logical

    def physical(self, ids_TK: torch.Tensor, rank: int) -> torch.Tensor:
        """Physical ids of logical ids (T, K) on source `rank`: token t takes replica (rank + t) mod (number of replicas).

        -1 is left alone. Ids from `logical` on, which no expert has, stay beyond all physical ones.
        """
        if not self.redundant:
            return ids_TK
        table = [self.replicas(e) for e in range(self.logical)]
        width = max(len(row) for row in table)
        table_ER = torch.tensor([row + [-1] * (width - len(row)) for row in table], device=ids_TK.device)
        count_E = torch.tensor([len(row) for row in table], device=ids_TK.device)
        routed = (ids_TK >= 0) & (ids_TK < self.logical)
        ids = torch.where(routed, ids_TK, 0).long()
        turn = rank + torch.arange(ids.size(0), device=ids.device)[:, None]
        beyond = torch.where(ids_TK < 0, ids_TK, ids_TK + self.redundant)
        return torch.where(routed, table_ER[ids, turn % count_E[ids]].to(ids_TK.dtype), beyond)

    def columns(self, intermediate: int, rank: int) -> slice:
        """Which of the I intermediate columns `rank` holds: consecutive, the first I mod tp shards hold one more."""
        shard = local_experts(intermediate, self.tp, self.tp_rank(rank))
        return slice(shard[0], shard[-1] + 1)
