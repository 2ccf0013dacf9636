"""The plain pipeline over simulated ranks: tokens split over R ranks, an all-to-all to the experts' owners and back.

All ranks run one after the other in one process. The result is that of a single rank, so that the same oracle judges it;
`rows` and `expert_num_tokens` show what arrived at every owner.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.harness.faults.gemm import Tile
from moeproof.harness.faults.permute import Plan
from moeproof.harness.faults.pipeline import CLAIMS, SHOWS, Pipeline, supports
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.placement import local_experts
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
SPLITS = {
    "even": (1, 1, 1),
    "uneven": (5, 2, 1),
    "empty": (3, 0, 1),
}
"""Share of the tokens that each of three ranks holds."""


@dataclass(frozen=True)
class Message:
    """What one rank received: rows (n, H), and for each row its expert here (-1 = none), its slot t * K + k, its weight."""

    rows: Tensor
    expert: Tensor
    slot: Tensor
    weight: Tensor


class World(Pipeline):
    """`split` names how tokens lie on the ranks."""

    def __init__(self, split: str = "uneven") -> None:
        super().__init__()
        self.split = split

    def num_ranks(self) -> int:
        return len(SPLITS[self.split])

    def sizes(self, T: int) -> list[int]:
        """Tokens of each rank; the first takes what does not divide."""
        shares = SPLITS[self.split]
        sizes = [T * share // sum(shares) for share in shares]
        return [sizes[0] + T - sum(sizes), *sizes[1:]]

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        p = inputs.problem
        shown: dict[str, Tensor] = {}
        if inputs.logits is not None:
            shown["topk_ids"], shown["topk_weights"] = self.route(inputs)
        T, K = inputs.topk_ids.shape
        staged = self.stage_messages(inputs, self.layer_input(inputs))
        sent = [self.receive(staged, rank, inputs) for rank in range(self.num_ranks())]
        home = [torch.zeros(T * K, n, dtype=inputs.w1.dtype) for n in (p.N, p.I, p.hidden)]
        # Weights of routed slots come back with their rows; identity experts are nobody's, their weights stay at home.
        routed = (inputs.topk_ids >= 0) & self.in_range(inputs.topk_ids, inputs)
        weights = torch.where(routed, 0.0, inputs.topk_weights).flatten()
        arrived, counts = [], []
        for rank, message in enumerate(sent):
            results, plan = self.on_rank(message, rank, inputs)
            live = self.valid(message, T * K)
            arrived.append(self.by_region(message.rows, plan, max(T * K, 1)))
            counts.append(plan.counts.int())
            returned = self.give_back(results, message, live)
            for tensor, part in zip(home, returned, strict=True):
                tensor[message.slot[live]] = part
            weights[message.slot[live]] = message.weight[live]
        shown["expert_num_tokens"] = torch.cat(counts)
        shown["rows"] = torch.cat(arrived)
        gate_up, h, y = (t.view(T, K, t.shape[1]) for t in home)
        return shown | {"gate_up": gate_up, "h": h, "y": y, "out": self.combine(inputs, y, weights.view(T, K))}

    def stage_messages(self, inputs: Inputs, x: Tensor) -> list[Message]:
        """Each rank's staging slot, in two micro-batches; a slow peer reads the first only after the second was staged."""
        sizes, K = self.sizes(inputs.problem.T), inputs.topk_ids.shape[1]
        longest = max(sizes, default=0)
        messages, start = [], 0
        for size in sizes:
            tokens = torch.arange(start, start + size)
            slot: Tensor = (tokens[:, None] * K + torch.arange(K)).flatten()
            ids = self.equalise(inputs.topk_ids[tokens], longest, inputs)
            fill = (longest - size) * K
            messages.append(
                Message(
                    torch.cat([x[tokens].repeat_interleave(K, 0), x.new_zeros(fill, x.shape[1])]),
                    ids.flatten().long(),
                    torch.cat([slot, slot.new_full((fill,), inputs.topk_ids.numel())]),
                    torch.cat([inputs.topk_weights[tokens].flatten(), torch.zeros(fill)]),
                )
            )
            start += size
        return [self.read_staged(m) for m in messages]

    def equalise(self, ids: Tensor, longest: int, inputs: Inputs) -> Tensor:
        """Ranks send equally many token rows; the added ones are not routed."""
        return torch.cat([ids, ids.new_full((longest - ids.shape[0], ids.shape[1]), -1)])

    def read_staged(self, message: Message) -> Message:
        """Two staging slots in turn: what is read is what was written."""
        return message

    def receive(self, staged: list[Message], rank: int, inputs: Inputs) -> Message:
        """Rows for the experts of `rank`, in order of sender, in a buffer sized for everything that could come."""
        p = inputs.problem
        mine = torch.full((p.weight_experts + 1,), -1)
        own = local_experts(p.weight_experts, self.num_ranks(), rank)
        mine[own] = torch.arange(len(own))
        parts: list[Message] = []
        for message in staged:
            routed = (message.expert >= 0) & (message.expert < p.weight_experts)
            local = self.own_experts(mine[torch.where(routed, message.expert, p.weight_experts)], message.expert, rank)
            keep = local >= 0
            parts.append(Message(message.rows[keep], local[keep], message.slot[keep], message.weight[keep]))
        rows, expert, slot, weight = (
            torch.cat([getattr(m, name) for m in parts]) for name in ("rows", "expert", "slot", "weight")
        )
        return self.buffer(Message(rows, expert, slot, self.arrived_weights(weight)), inputs.topk_ids.numel(), rank)

    def own_experts(self, local: Tensor, ids: Tensor, rank: int) -> Tensor:
        """Local index of each sent id, -1 where another rank owns it."""
        return local

    def arrived_weights(self, weight: Tensor) -> Tensor:
        """All fields of a row are there when its flag is."""
        return weight

    def buffer(self, got: Message, capacity: int, rank: int) -> Message:
        """The receive buffer: rows beyond what came belong to no expert."""
        rest = max(capacity - got.slot.numel(), 0)
        rows = torch.cat([got.rows, torch.empty(rest, got.rows.shape[1], dtype=got.rows.dtype)])
        expert = torch.cat([got.expert, self.tail_experts(rest, rank, got.expert)])
        slot = torch.cat([got.slot, torch.full((rest,), capacity)])
        return Message(rows, expert, slot, torch.cat([got.weight, torch.zeros(rest)]))

    def tail_experts(self, rest: int, rank: int, expert: Tensor) -> Tensor:
        return torch.full((rest,), -1)

    def valid(self, message: Message, num_slots: int) -> Tensor:
        """Rows whose result goes back to a slot."""
        return (message.expert >= 0) & (message.slot < num_slots)

    def on_rank(self, message: Message, rank: int, inputs: Inputs) -> tuple[tuple[Tensor, Tensor, Tensor], Plan]:
        """(gate_up, h, y) of the received rows by this rank's experts."""
        own = local_experts(inputs.problem.weight_experts, self.num_ranks(), rank)
        part = {name: t[own] for name, t in inputs.tensors() if name in ("w1", "w2", "b1", "b2")}
        count = message.expert.numel()
        here = inputs.map(part | {"topk_ids": message.expert[:, None].int()})
        plan = self.plan(message.expert[:, None], len(own), self.tile(count, len(own), inputs.problem.N).M)
        target = torch.where(plan.slots < count, plan.slots, -1)
        results = self.experts(here, message.rows, plan.slots, plan, target, message.expert >= 0)
        return results, plan

    def target_rows(self, plan: Plan, target: Tensor, inputs: Inputs) -> int:
        return inputs.topk_ids.numel()

    def give_back(
        self, results: tuple[Tensor, Tensor, Tensor], message: Message, live: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that return to their tokens' ranks; none from a rank that received nothing."""
        gate_up, h, y = results
        return gate_up[live], h[live], y[live]

    def by_region(self, rows: Tensor, plan: Plan, region: int) -> Tensor:
        """(e, region, H): received rows by local expert, for show."""
        out = rows.new_zeros(plan.counts.numel(), region, rows.shape[1])
        owner = plan.blocks.repeat_interleave(plan.block)
        for expert in range(plan.counts.numel()):
            mine = plan.slots[(owner == expert) & (plan.slots < rows.shape[0])][:region]
            out[expert, : mine.numel()] = rows[mine]
        return out


class TensorParallel(Pipeline):
    """Two ranks that each hold half of the depth of GEMM2."""

    tp = 2

    def num_ranks(self) -> int:
        return 2

    def split_k(self, rows: int) -> bool:
        return False

    def tile(self, tokens: int, num_experts: int, width: int) -> Tile:
        return Tile(8, 16, 32)


def world_supports(p: Problem) -> str | None:
    if p.ep > 1:
        return "the ranks are simulated from a problem with all experts (ep=1)"
    if p.weight_experts < 3:
        return f"{p.weight_experts} experts for three ranks"
    if p.layout != "standard":
        return f"layout {p.layout}: rows are shown by region, the plan is standard"
    if p.latent:
        return "rows are those of hidden_states, not of the latent width"
    return supports(p)


def world_candidate(world: World, name: str = "world") -> Candidate:
    return Candidate(name, world, tuple(SHOWS), world_supports, CLAIMS)
