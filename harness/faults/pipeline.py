"""A plain MoE layer in float32 steps, every stage shown: healthy as it stands, and the ground that faults are planted in.

Each method of the *Steps classes is a hook: small, pure, and replaceable by one that is wrong. One Pipeline is one layer of
an engine: it lives for many calls and keeps what an engine keeps (compiled packings, receive buffers) in `memory`.
"""

from __future__ import annotations

import torch

from moeproof.harness.faults.combine import CombineSteps
from moeproof.harness.faults.gemm import GemmSteps
from moeproof.harness.faults.permute import PermuteSteps, Plan
from moeproof.harness.faults.route import RouteSteps
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
CLAIMS = Claims(ties="lowest", total_router=True)
SHOWS = (
    "topk_ids topk_weights rows expert_num_tokens sorted_slots block_expert num_padded gate_up h y out".split()  # noqa: SIM905
)


class Pipeline(RouteSteps, PermuteSteps, GemmSteps, CombineSteps):
    """inputs -> canonical tensors by name (reference.contract.stages)."""

    def __init__(self) -> None:
        self.memory: dict[object, Tensor] = {}

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        p = inputs.problem
        inputs = self.admit(inputs)
        shown: dict[str, Tensor] = {}
        if inputs.logits is not None:
            shown["topk_ids"], shown["topk_weights"] = self.route(inputs)
        x = self.layer_input(inputs)
        local, plan = self.plan_of(inputs)
        if p.layout == "batched":
            rows = self.dispatch(x, plan, inputs.topk_ids.shape[1])
            shown["rows"] = rows.view(inputs.w1.shape[0], -1, x.shape[1])
            shown["expert_num_tokens"] = plan.counts.int()
            source = target = torch.where(plan.slots < local.numel(), torch.arange(plan.slots.numel()), -1)
        else:
            if plan.slots.numel():
                shown |= self.show_plan(plan)
            rows = x
            source = self.token_of(plan.slots, inputs.topk_ids.shape[1])
            target = torch.where(plan.slots < inputs.topk_ids.numel(), plan.slots, -1)
        live = local.flatten()[: inputs.topk_ids.numel()] >= 0
        gate_up, h, y = self.experts(inputs, rows, source, plan, target, live)
        if p.layout == "batched":
            gate_up, h, y = (self.to_slots(t, plan, inputs.topk_ids.numel()) for t in (gate_up, h, y))
            y = self.fill_dead(y, live, inputs)
        gate_up, h, y = (t.view(p.T, inputs.topk_ids.shape[1], t.shape[1]) for t in (gate_up, h, y))
        return shown | {"gate_up": gate_up, "h": h, "y": y, "out": self.combine(inputs, y, inputs.topk_weights)}

    def admit(self, inputs: Inputs) -> Inputs:
        """Arguments as the kernels read them: through their strides."""
        return inputs

    def plan_of(self, inputs: Inputs) -> tuple[Tensor, Plan]:
        """(local ids of all token rows, the plan of their slots): by region in the batched layout, else sorted in blocks."""
        local = self.local_ids(self.pad_tokens(inputs.topk_ids), inputs)
        if inputs.problem.layout == "batched":
            region = self.region(local, inputs.problem)
            return local, self.plan(local, inputs.w1.shape[0], region, region)
        return local, self.plan(local, inputs.w1.shape[0], self.tile(local.numel(), inputs.w1.shape[0], inputs.problem.N).M)

    def layer_input(self, inputs: Inputs) -> Tensor:
        """(T, H'): the latent projection and the weight on the input, where the problem has them."""
        x = inputs.hidden_states
        if inputs.latent_down is not None:
            x = (x.float() @ inputs.latent_down.float().T).to(x.dtype)
        if inputs.problem.weight_on_input:
            routed = (inputs.topk_ids >= 0) & (inputs.topk_ids < inputs.problem.named_ids)
            w = torch.where(routed, inputs.topk_weights, 0.0)
            x = (torch.where(routed, x, 0.0).float() * w).to(x.dtype)  # 0, not -0, where nothing is routed
        return x

    def region(self, local: Tensor, p: Problem) -> int:
        """Rows of one expert in the batched layout: as declared, plus what padding rows need (none)."""
        return p.rows_per_expert

    def dispatch(self, x: Tensor, plan: Plan, slots_per_token: int) -> Tensor:
        """(e * region, H'): each live slot's token row at its place; the rest unwritten."""
        rows = torch.empty(plan.slots.numel(), x.shape[1], dtype=x.dtype)
        live = (plan.slots < x.shape[0] * slots_per_token).nonzero().flatten()
        rows[live] = x[self.token_of(plan.slots[live], slots_per_token)]
        return rows

    def show_plan(self, plan: Plan) -> dict[str, Tensor]:
        return {
            "sorted_slots": plan.slots.int(),
            "block_expert": plan.blocks.int(),
            "num_padded": torch.tensor([plan.used], dtype=torch.int32),
        }

    def experts(
        self, inputs: Inputs, rows: Tensor, source: Tensor, plan: Plan, target: Tensor, live: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """gate_up (R, N), h (R, I), y (R, H') by target row. GEMM1's output and y share a workspace, h has its own."""
        act, dtype = inputs.problem.act, rows.dtype
        count = self.target_rows(plan, target, inputs)
        N, width, hidden = inputs.w1.shape[1], inputs.w2.shape[2], inputs.w2.shape[1]
        size13, size2 = self.workspace_elements(count, N, width, hidden)
        spaces = {"13": torch.empty(size13, dtype=dtype), "2": torch.empty(size2, dtype=dtype)}
        gate_up = self.take(spaces["13"], count, N)
        self.grouped_gemm("gemm1", rows, source, inputs.w1, inputs.b1, plan, target, gate_up)
        shown_gate_up = gate_up.clone()
        h = self.take(spaces["2"], count, width)
        h.copy_(self.activate(gate_up, self.packing(act, N)))
        shown_h = h.clone()
        y = self.take(spaces[self.home_of_y()], count, hidden)
        if count == live.numel():
            y.copy_(self.fill_dead(y, live, inputs))
        self.grouped_gemm("gemm2", h, target, inputs.w2, inputs.b2, plan, target, y)
        return shown_gate_up, shown_h, y.clone()

    def target_rows(self, plan: Plan, target: Tensor, inputs: Inputs) -> int:
        """Rows of the expert tensors: slots, or the rows of all regions."""
        return target.numel() if inputs.problem.layout == "batched" else inputs.topk_ids.numel()

    def workspace_elements(self, rows: int, N: int, width: int, hidden: int) -> tuple[int, int]:
        return rows * max(N, hidden), rows * width

    def take(self, space: Tensor, rows: int, columns: int) -> Tensor:
        """The first rows x columns elements. What does not fit lies behind the workspace, in someone else's memory."""
        room = space.untyped_storage().nbytes() // space.element_size() - space.storage_offset()
        if rows * columns > room:
            return space.as_strided((room // columns, columns), (columns, 1))
        return space.as_strided((rows, columns), (columns, 1))

    def packing(self, act: Activation, N: int) -> Activation:
        """The activation a compiled kernel was built for, looked up by everything that changes it."""
        compiled: dict[object, Activation] = self.memory.setdefault("compiled", {})  # type: ignore[assignment,arg-type]
        return compiled.setdefault(self.cache_key(act, N), act)

    def cache_key(self, act: Activation, N: int) -> object:
        return act, N

    def home_of_y(self) -> str:
        """GEMM1's output is dead when GEMM2 writes; its input is not."""
        return "13"

    def to_slots(self, t: Tensor, plan: Plan, num_slots: int) -> Tensor:
        """(e * region, C) -> (T * K, C): back through the rows' slots; rows of dead slots stay unwritten."""
        out = torch.empty(num_slots, t.shape[1], dtype=t.dtype)
        real = plan.slots < num_slots
        out[plan.slots[real]] = t[real]
        return out

    def fill_dead(self, y: Tensor, live: Tensor, inputs: Inputs) -> Tensor:
        """Rows (T * K, H') that no expert here writes are zero before anything sums them."""
        return torch.where(live[:, None], y, torch.zeros_like(y))


def supports(p: Problem) -> str | None:
    """Why the plain pipeline does not do this problem; None where it does."""
    if p.quant.quantised:
        return f"scheme {p.scheme}: unquantised only"
    if p.latent and p.router.zero_experts:
        return "an identity expert adds x (H wide) to a sum in the latent width"
    if p.latent and p.layout == "batched":
        return "rows of the batched layout are those of hidden_states, not of the latent width"
    if p.ep > 1 and (p.shared or p.router.zero_experts):
        return "shared and identity terms would enter the sum on every rank; only routed experts are split"
    if p.ep > 1 and p.latent_norm:
        return "latent_norm of a partial sum is no part of the norm of the sum"
    return None


def candidate(pipeline: Pipeline, name: str = "plain") -> Candidate:
    """A pipeline, healthy or not, as the harness judges it."""
    return Candidate(name, pipeline, tuple(SHOWS), supports, CLAIMS)
