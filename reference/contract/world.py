"""One MoE layer call spread over ranks: the whole problem, and which rank holds which of its tokens and experts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.shards import check_shards


@dataclass(frozen=True)
class World:
    """`problem` is the layer as one rank would compute it: T counts the tokens of all ranks together.

    The ranks hold consecutive rows of it, so a world differs from its single-rank problem in nothing but where things are:
    whatever the ranks compute together must be what one rank computes alone. With tensor parallelism the tp ranks of a group
    either hold the same tokens, or (sequence parallel, `sp`) a part of them each.
    """

    problem: Problem
    tokens: tuple[int, ...]
    """Tokens of each rank."""
    tp: int = 1
    sp: bool = False
    redundant: int = 0
    """Replicas beyond one per expert: physical ids after E."""

    def __post_init__(self) -> None:
        p = self.problem
        check(p.ep == 1, f"ep={p.ep} is one rank's view of a world; give ranks= instead, and ep follows from it")
        check(self.tp >= 1, f"tp={self.tp} must be at least 1")
        check(self.tp <= p.I, f"tp={self.tp} shards need at least as many intermediate columns, not I={p.I}")
        check(not (self.sp and self.tp == 1), "sp splits the tokens of a tensor-parallel group: it needs tp > 1")
        check(not (self.tp > 1 and p.latent), "the latent projections lie outside the sharded experts: tp must be 1")
        after = p.router.zero_experts or p.router.fused_shared
        check(not (self.redundant and after), "redundant experts take the ids after E, as zero and fused shared experts do")
        check(all(n >= 0 for n in self.tokens), f"tokens {self.tokens} must not be negative")
        check_shards(p, self.grid)
        shares = self.tokens if self.distinct else self.tokens[:: self.tp]
        check(
            self.distinct or all(self.tokens[r] == self.tokens[r - r % self.tp] for r in range(self.ranks)),
            f"tokens {self.tokens}: without sp the {self.tp} ranks of a tensor-parallel group hold the same tokens",
        )
        check(sum(shares) == p.T, f"the ranks hold {sum(shares)} tokens, T={p.T}; they must be equal")

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def grid(self) -> Grid:
        return Grid(self.problem.weight_experts, self.ranks, self.tp, self.redundant, self.problem.placement)

    @property
    def distinct(self) -> bool:
        """No token is on two ranks."""
        return self.tp == 1 or self.sp

    @property
    def max_tokens(self) -> int:
        return max(self.tokens)

    def rows(self, rank: int) -> slice:
        """Rows of the whole problem's tokens that `rank` holds."""
        before = self.tokens[:rank] if self.distinct else self.tokens[: rank - rank % self.tp : self.tp]
        return slice(sum(before), sum(before) + self.tokens[rank])

    def where(self, token: int) -> tuple[int, int]:
        """(first rank that holds it, its index there) of a row of the whole problem."""
        for rank in range(self.ranks):
            rows = self.rows(rank)
            if rows.start <= token < rows.stop:
                return rank, token - rows.start
        raise IndexError(f"token {token} is not in [0, {self.problem.T})")

    def rank_problem(self, rank: int) -> Problem:
        """What `rank` is asked: its own tokens, physical experts, its shard of I.

        With replicas ROUTE lies behind: ids are physical already, and the router is the plain one.
        """
        grid, p = self.grid, self.problem
        columns = grid.columns(p.I, rank)
        mine = replace(
            p,
            T=self.tokens[rank],
            I=columns.stop - columns.start,
            E=p.E + self.redundant,
            router=Router() if self.redundant else p.router,
            capacity=p.rows_per_expert if p.layout == "batched" else 0,
        )
        return replace(mine, ep=grid.ep, ep_rank=grid.ep_rank(rank))


def rank_seed(seed: int, rank: int) -> int:
    """Seed of what `rank` draws for itself (delays, its torch generator): the first 8 bytes of a SHA-256, 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/rank/{rank}".encode()).digest()[:8], "little") >> 1
