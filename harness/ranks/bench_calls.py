"""What the benchmark of ranks calls on each of them: a pair's prepare and finalize, or the raw collectives beside them.

Each has dispatch() and combine(), in turn, and says what is wrong with what the last of each left here. Payloads are tags
(harness.ranks.tags), so every row is held against who it must be, at the size that is timed. Both can be captured in CUDA
graphs where the one called allows it: their tensors stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from moeproof.harness.judging.compare import compare
from moeproof.harness.ranks.bench_load import Load
from moeproof.harness.ranks.context import RankContext
from moeproof.harness.ranks.tags import DIGITS, check_delivery, identities, tag
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.modular import Prepared
from moeproof.reference.eager.ranks_link import GroupLink, either
from moeproof.reference.oracle.bounds import combine_error
from moeproof.reference.oracle.rounding import lowest_bit
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor
CHUNK = 1024
"""Tokens whose output is compared at once, in float64."""
SCALES = 4


class Calls(Protocol):
    def dispatch(self) -> None: ...

    def combine(self) -> None: ...

    def compute(self) -> None:
        """What stands between a dispatch and its combine, untimed, and in tensors that stay where they are."""

    def spoil(self) -> None:
        """Overwrite what earlier calls left here, so that nobody takes it for a result of the next."""

    def wrong_rows(self) -> list[str]: ...

    def wrong_output(self) -> list[str]: ...


def factor(expert: Tensor, dtype: torch.dtype) -> Tensor:
    """What the stand-in for expert e multiplies its rows with: 2^(e mod 4), exact, and 0 where there is none (-1)."""
    return torch.where(expert >= 0, 2.0 ** (expert % SCALES), 0.0).to(dtype)


class PairCalls:
    """prepare and finalize of a RankPair. Expert e returns its rows times 2^(e mod 4)."""

    def __init__(self, context: RankContext, pair: RankPair, load: Load) -> None:
        self.pair, self.load, self.rank = pair, load, context.rank
        self.inputs = load.inputs(context.rank)
        self.parts = pair.prepare_finalize(self.inputs, load.case.world, GroupLink(context.group, context.device))
        wanted = self.parts.topk_indices_dtype()
        self.ids = self.inputs.topk_ids if wanted is None else self.inputs.topk_ids.to(wanted)
        self.output = torch.empty_like(self.inputs.hidden_states)
        self.prepared: Prepared | None = None
        self.y: Tensor | None = None

    def dispatch(self) -> None:
        i = self.inputs
        self.prepared = self.parts.prepare(
            i.hidden_states, None, None, i.topk_weights, self.ids, i.problem.weight_experts, i.expert_map, False
        )

    def compute(self) -> None:
        assert self.prepared is not None, "dispatch comes first"
        y = self._experts(self.prepared)
        if self.y is None or self.y.shape != y.shape:
            self.y = y
        else:
            self.y.copy_(y)

    def combine(self) -> None:
        assert self.prepared is not None and self.y is not None, "dispatch and compute come first"
        ids, weights = self.prepared[3:]
        self.parts.finalize(
            self.output,
            self.y,
            self.inputs.topk_weights if weights is None else weights,
            self.ids if ids is None else ids,
            False,
        )

    def spoil(self) -> None:
        self.output.fill_(torch.nan)
        if self.prepared is None:
            return
        rows = self.prepared[0]
        if rows.is_contiguous() and not _same_memory(rows, self.inputs.hidden_states):
            rows.view(torch.uint8).fill_(0xFF)

    def _experts(self, prepared: Prepared) -> Tensor:
        rows, _, _, ids, _ = prepared
        if rows.numel() == 0:
            return torch.empty_like(rows)
        if rows.dim() == 3:
            local = torch.tensor(self.load.case.world.grid.local(self.rank), device=rows.device)
            return rows * factor(local, rows.dtype)[:, None, None]
        own = self._local(self.ids if ids is None else ids)
        return rows[:, None] * factor(own, rows.dtype)[:, :, None]

    def _local(self, ids: Tensor) -> Tensor:
        """ids with -1 wherever the expert is not here, whether or not prepare did that."""
        groups = self.load.case.world.grid.group_of().to(ids.device)
        here = (ids >= 0) & (groups[ids.clamp(min=0).long()] == self.load.case.world.grid.ep_rank(self.rank))
        return torch.where(here, ids, -1)

    def wrong_rows(self) -> list[str]:
        assert self.prepared is not None, "dispatch comes first"
        rows, _, counts, ids, _ = self.prepared
        if rows.dim() == 3:
            if counts is None:
                return ["DISPATCH expert_num_tokens: was not returned, so nobody knows which rows are live"]
            local = torch.tensor(self.load.case.world.grid.local(self.rank), device=rows.device)
            live = torch.arange(rows.size(1), device=rows.device) < counts.to(rows.device)[:, None]
            expert, place = live.nonzero(as_tuple=True)
            rows, ids = rows[expert, place], local[expert][:, None]
        found = check_delivery(self.rank, self.load.triples(self.rank), rows, self._local(self.ids if ids is None else ids))
        return [str(f) for f in found]

    def wrong_output(self) -> list[str]:
        """out must be x * sum of w * 2^(e mod 4) over the live slots, within the bound of the pair's claim."""
        x, fmt, claims = self.inputs.hidden_states, self.inputs.problem.fmt, self.pair.claims
        w = torch.where(self.inputs.topk_ids >= 0, self.inputs.topk_weights, 0.0).double()
        term = w * factor(self.inputs.topk_ids, torch.float64)
        head = x[:, :DIGITS].double()  # every other column repeats one of these
        exact = head * term.sum(dim=1, keepdim=True)
        magnitude = head.abs() * term.abs().sum(dim=1, keepdim=True)
        want = stored(exact, combine_error(magnitude, term.size(1) + 1, lowest_bit(term), fmt, claims), fmt)
        column = torch.arange(x.size(1), device=x.device) % DIGITS
        for first in range(0, x.size(0), CHUNK):
            some = slice(first, first + CHUNK)
            assert want.bound is not None
            part = Value(want.value[some][:, column], want.bound[some][:, column], None, want.fmt)
            if found := compare("out", self.output[some], part).findings:
                token = (found[0].token or 0) + first
                return [f"COMBINE out, rank {self.rank}, token {token}: {found[0]}"]
        return []


class _Raw:
    """A bare collective computes nothing; `there` and `back` are what its two ways fill."""

    there: Tensor
    back: Tensor

    def compute(self) -> None:
        pass

    def spoil(self) -> None:
        self.there.fill_(-1)
        self.back.fill_(-1)


class RawExchange(_Raw):
    """all_to_all_single there and back, into buffers that exist: the same rows as a dispatch, and nothing else."""

    def __init__(self, context: RankContext, load: Load, by_slot: bool) -> None:
        table = load.slot_rows() if by_slot else load.token_rows()
        self.rank, self.send, self.receive = context.rank, table[context.rank].tolist(), table[:, context.rank].tolist()
        self.rows = own_rows(load, context.rank, by_slot)
        self.there = self.rows.new_empty(sum(self.receive), self.rows.size(1))
        self.back = torch.empty_like(self.rows)

    def dispatch(self) -> None:
        dist.all_to_all_single(self.there, self.rows, self.receive, self.send)

    def combine(self) -> None:
        dist.all_to_all_single(self.back, self.there, self.send, self.receive)

    def wrong_rows(self) -> list[str]:
        senders = torch.repeat_interleave(torch.arange(len(self.receive)), torch.tensor(self.receive))
        return _strange(self.rank, torch.equal(identities(self.there)[:, 0].cpu(), senders))

    def wrong_output(self) -> list[str]:
        return _changed(self.rank, torch.equal(self.back, self.rows))


class RawGather(_Raw):
    """all_gather of every rank's rows, and reduce_scatter of float32 rows as many."""

    def __init__(self, context: RankContext, load: Load) -> None:
        p, most = load.case.problem, load.case.world.max_tokens
        self.rank, self.size = context.rank, context.world_size
        self.rows = tag(context.rank, most, p.H, p.fmt.dtype, load.device)
        self.there = self.rows.new_empty(self.size * most, p.H)
        self.sums = torch.cat([tag(rank, most, p.H, torch.float32, load.device) for rank in range(self.size)])
        self.back = self.sums.new_empty(most, p.H)
        self._gather = either("all_gather_single", "all_gather_into_tensor")
        self._scatter = either("reduce_scatter_single", "reduce_scatter_tensor")

    def dispatch(self) -> None:
        self._gather(self.there, self.rows)

    def combine(self) -> None:
        self._scatter(self.back, self.sums)

    def wrong_rows(self) -> list[str]:
        senders = identities(self.there)[:, 0].view(self.size, -1)
        return _strange(self.rank, bool((senders == torch.arange(self.size, device=senders.device)[:, None]).all()))

    def wrong_output(self) -> list[str]:
        return _changed(self.rank, torch.equal(self.back, self.size * self.rows.float()))


class RawPut(_Raw):
    """Copies into the peers' symmetric memory and one barrier, there and back: what a one-sided exchange moves at least."""

    def __init__(self, context: RankContext, load: Load) -> None:
        import torch.distributed._symmetric_memory as symmetric

        table, p, most = load.token_rows(), load.case.problem, load.case.world.max_tokens
        self.rank, self.size = context.rank, context.world_size
        self.send, self.receive = table[self.rank].tolist(), table[:, self.rank].tolist()
        self.rows = own_rows(load, context.rank, by_slot=False)
        # A region of `most` rows for every peer, for the way there and for the way back.
        self.buffer = symmetric.empty(2, self.size, most, p.H, dtype=p.fmt.dtype, device=load.device)
        self.there, self.back = self.buffer
        self.handle = symmetric.rendezvous(self.buffer, context.group.group_name)

    def dispatch(self) -> None:
        self._put(0, list(self.rows.split(self.send)))

    def combine(self) -> None:
        self._put(1, [self.buffer[0, peer, :rows] for peer, rows in enumerate(self.receive)])

    def _put(self, way: int, parts: list[Tensor]) -> None:
        for turn in range(self.size):
            peer = (self.rank + turn) % self.size  # no two ranks begin with the same peer
            theirs = self.handle.get_buffer(peer, self.buffer.shape, self.buffer.dtype)
            theirs[way, self.rank, : parts[peer].size(0)].copy_(parts[peer])
        self.handle.barrier()

    def wrong_rows(self) -> list[str]:
        senders = [identities(self.buffer[0, peer, :rows])[:, 0] for peer, rows in enumerate(self.receive)]
        return _strange(self.rank, all(bool((names == peer).all()) for peer, names in enumerate(senders)))

    def wrong_output(self) -> list[str]:
        back = torch.cat([self.buffer[1, peer, :rows] for peer, rows in enumerate(self.send)])
        return _changed(self.rank, torch.equal(back, self.rows))


RAW: dict[str, Callable[[RankContext, Load], Calls]] = {
    "raw all_to_all, a row per token": lambda context, load: RawExchange(context, load, by_slot=False),
    "raw all_to_all, a row per slot": lambda context, load: RawExchange(context, load, by_slot=True),
    "raw all_gather, reduce_scatter": RawGather,
    "raw symmetric put, a row per token": RawPut,
}
"""The live anchors: bare collectives of the transport, on the same bytes."""


def own_rows(load: Load, rank: int, by_slot: bool) -> Tensor:
    """(n, H): the tagged rows that `rank` sends, by target rank and then by token."""
    p, mine = load.case.world.rank_problem(rank), load.case.world.rows(rank)
    x = tag(rank, p.T, p.H, p.fmt.dtype, load.device)
    target, needed = load.target[mine], load.needed[mine]
    if not by_slot:
        return x[needed.T.nonzero()[:, 1]]
    return x[torch.cat([(target == r).nonzero()[:, 0] for r in range(load.case.ranks)])]


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _strange(rank: int, right: bool) -> list[str]:
    return [] if right else [f"rank {rank}: rows arrived that are not their sender's"]


def _changed(rank: int, right: bool) -> list[str]:
    return [] if right else [f"rank {rank}: what came back is not what must"]
