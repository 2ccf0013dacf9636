"""The plain MoE layer over a quantised scheme, every stage shown: healthy as it stands, and the ground of P11-P18 and the like.

ROUTE, PERMUTE, ACT and COMBINE are the plain pipeline's. Quantisers and products are the second reading of the scheme table
in reference.eager.quantise, which shares nothing with the oracle.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeproof.harness.faults.pipeline import CLAIMS, SHOWS, Pipeline, supports
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import Quantiser
from moeproof.reference.eager.quantise import Matrix, activations, matmul, plain, quantise, weights

Tensor = torch.Tensor


@dataclass(frozen=True)
class Coded:
    """Rows (R, .) as stored, and their scales (R, G), or (1, 1) where one serves the whole tensor; None = not quantised."""

    codes: Tensor
    scales: Tensor | None = None

    def take(self, rows: Tensor, scales: Tensor | None) -> Coded:
        """These rows' codes, with the given scales."""
        return Coded(self.codes[rows], scales)


class QuantPipeline(Pipeline):
    """inputs -> canonical tensors by name. What a fault replaces, in order: quant1, move_scales, lay_out, load_rows,
    load_weights, product, clear_dead, quant2."""

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        p, K = inputs.problem, inputs.topk_ids.shape[1]
        inputs = self.admit(inputs)
        shown: dict[str, Tensor] = {}
        if inputs.logits is not None:
            shown["topk_ids"], shown["topk_weights"] = self.route(inputs)
        local, plan = self.plan_of(inputs)
        owner = plan.blocks.repeat_interleave(plan.block)
        real = (plan.slots < inputs.topk_ids.numel()) & (owner >= 0)
        slots, owner = plan.slots[real], owner[real]
        x = self.quantised(self.layer_input(inputs), p.quant.a1, inputs.a1_scale, "quant1")
        if x.scales is not None:
            shown |= {"xq": x.codes, "xs": x.scales}
        moved = self.dispatched(x, self.token_of(slots, K), inputs)
        if p.layout == "batched":
            shown |= self.show_regions(moved, real.nonzero().flatten(), inputs.w1.shape[0], plan.slots.numel(), p)
            shown["expert_num_tokens"] = plan.counts.int()
        elif plan.slots.numel():
            shown |= self.show_plan(plan)
        live = local.flatten()[: inputs.topk_ids.numel()]
        gate_up = self.experts_product("gemm1", moved, owner, slots, inputs)
        h = self.clear_dead(self.activate(gate_up, p.act), live >= 0)
        hq = self.quantised(h, p.quant.a2, self.slot_scale(inputs, live), "quant2")
        if hq.scales is not None:
            shown |= {"hq": self.by_slot(hq.codes, inputs), "hs": self.by_slot(hq.scales, inputs)}
        by_row = p.quant.a2 is not None and p.quant.a2.by_token and hq.scales is not None
        scales = hq.scales[slots] if by_row and hq.scales is not None else hq.scales
        y = self.experts_product("gemm2", hq.take(slots, scales), owner, slots, inputs)
        y = self.fill_dead(y, live >= 0, inputs)
        shown |= {name: self.by_slot(t, inputs) for name, t in (("gate_up", gate_up), ("h", h), ("y", y))}
        return shown | {"out": self.combine(inputs, shown["y"], inputs.topk_weights)}

    def by_slot(self, t: Tensor, inputs: Inputs) -> Tensor:
        """(T * K, C) -> (T, K, C); one scale for the whole tensor becomes (1, 1, 1)."""
        T, K = inputs.topk_ids.shape
        return t.view(T, K, -1 if t.numel() else t.shape[1]) if t.shape[0] == T * K else t.view(1, 1, 1)

    def quantised(self, rows: Tensor, q: Quantiser | None, given: Tensor | None, step: str) -> Coded:
        if q is None:
            return Coded(rows)
        return self.quant1(rows, q, given) if step == "quant1" else self.quant2(rows, q, given)

    def quant1(self, x: Tensor, q: Quantiser, given: Tensor | None) -> Coded:
        """x (T, H) -> codes and scales; `given` is the static or global scale."""
        return Coded(*quantise(x, q, x.dtype, given))

    def quant2(self, h: Tensor, q: Quantiser, given: Tensor | None) -> Coded:
        """h (T * K, I), rows of dead slots zero."""
        return Coded(*quantise(h, q, h.dtype, given))

    def clear_dead(self, h: Tensor, live: Tensor) -> Tensor:
        """An amax over the whole tensor must not see rows that nobody wrote."""
        return torch.where(live[:, None], h, torch.zeros_like(h))

    def slot_scale(self, inputs: Inputs, local: Tensor) -> Tensor | None:
        """a2_scale, (1, 1), or (T * K, 1) from one per local expert."""
        given = inputs.a2_scale
        return given if given is None or given.dim() == 2 else given.flatten()[local.clamp(min=0)][:, None]

    def dispatched(self, x: Coded, tokens: Tensor, inputs: Inputs) -> Coded:
        """Each row's token, codes and scales together; the scales by way of the layout that the kernel reads."""
        if x.scales is None:
            return x.take(tokens, None)
        scales = self.move_scales(x, tokens, inputs)
        return self.requantised(x.take(tokens, self.read_layout(self.lay_out(scales, inputs), scales.shape)), inputs)

    def move_scales(self, x: Coded, tokens: Tensor, inputs: Inputs) -> Tensor:
        """Scales go where their tokens go."""
        q = inputs.problem.quant.a1
        assert x.scales is not None and q is not None
        return x.scales[tokens] if q.by_token else x.scales

    def lay_out(self, scales: Tensor, inputs: Inputs) -> Tensor:
        """Row-major scales as the kernel reads them: column-major."""
        return scales.T.flatten()

    def read_layout(self, memory: Tensor, shape: torch.Size) -> Tensor:
        return torch.empty(shape, dtype=memory.dtype).copy_(memory.view(shape[1], shape[0]).T)

    def requantised(self, moved: Coded, inputs: Inputs) -> Coded:
        """Codes arrive as codes: nothing to do."""
        return moved

    def show_regions(self, moved: Coded, places: Tensor, experts: int, rows: int, p: Problem) -> dict[str, Tensor]:
        """Codes and scales at their places in the experts' regions; the rest unwritten."""
        regions = torch.empty(rows, moved.codes.shape[1], dtype=moved.codes.dtype)
        _bytes(regions)[places] = _bytes(moved.codes)
        shown = {"rows": regions.view(experts, rows // experts, -1)}
        if moved.scales is None or p.quant.a1 is None:
            return shown
        if not p.quant.a1.by_token:
            return shown | {"row_scales": moved.scales.expand(experts, 1, 1)}
        scales = torch.empty(rows, moved.scales.shape[1], dtype=moved.scales.dtype)
        _bytes(scales)[places] = _bytes(moved.scales)
        return shown | {"row_scales": scales.view(experts, rows // experts, -1)}

    def experts_product(self, name: str, rows: Coded, owner: Tensor, slots: Tensor, inputs: Inputs) -> Tensor:
        """(T * K, N) or (T * K, H) in the problem's dtype: each row through its expert's weights."""
        p, w, bias = inputs.problem, *((inputs.w1, inputs.b1) if name == "gemm1" else (inputs.w2, inputs.b2))
        q = p.quant.a1 if name == "gemm1" else p.quant.a2
        given = inputs.a1_scale if name == "gemm1" else self.slot_scale(inputs, torch.arange(w.shape[0]))
        out = torch.empty(inputs.topk_ids.numel(), w.shape[1], dtype=p.fmt.dtype)
        for expert in range(w.shape[0]):
            mine = (owner == expert).nonzero().flatten()
            if not mine.numel():
                continue
            scales = rows.scales
            if scales is not None and scales.shape[0] == rows.codes.shape[0]:
                scales = scales[mine]
            g = None if given is None or given.shape[0] == 1 else given[expert : expert + 1]
            x = self.load_rows(name, rows.take(mine, scales), q, given if g is None else g, p.fmt.dtype)
            product = self.product(name, x, self.load_weights(inputs, "w1" if name == "gemm1" else "w2", expert))
            out[slots[mine]] = (product if bias is None else product + bias[expert].float()).to(out.dtype)
        return out

    def load_rows(self, name: str, rows: Coded, q: Quantiser | None, given: Tensor | None, dtype: torch.dtype) -> Matrix:
        """What the codes stand for; `given` (1, 1) is the global scale of a two-level rule."""
        if q is None or rows.scales is None:
            return plain(rows.codes)
        return activations(rows.codes, rows.scales, q, dtype, given)

    def load_weights(self, inputs: Inputs, name: str, expert: int) -> Matrix:
        """One expert's w1 or w2."""
        q, t = inputs.problem.quant.w, self._stored(inputs, name, expert)
        assert q is not None and t[""] is not None and t["_scale"] is not None
        return weights(t[""], t["_scale"], t["_zp"], t["_global"], q, inputs.problem.fmt.dtype)

    def _stored(self, inputs: Inputs, name: str, expert: int) -> dict[str, Tensor | None]:
        fields = {end: getattr(inputs, f"{name}{end}") for end in ("", "_scale", "_zp", "_global")}
        return {end: None if t is None else t[expert] for end, t in fields.items()}

    def product(self, name: str, x: Matrix, w: Matrix) -> Tensor:
        """float32 (R, B)."""
        return matmul(x, w)


def _bytes(t: Tensor) -> Tensor:
    """The same memory as bytes: not every operation knows 8-bit floats."""
    return t.view(torch.uint8)


def quant_supports(p: Problem) -> str | None:
    if not p.quant.quantised:
        return "unquantised: the plain pipeline's"
    return supports(replace(p, scheme="none"))


QUANT_SHOWS = (*SHOWS, "xq", "xs", "hq", "hs", "row_scales")


def quant_candidate(pipeline: QuantPipeline, name: str = "quantised", scheme: str = "") -> Candidate:
    """A quantised pipeline, healthy or not, as the harness judges it; for one scheme only where one is named."""

    def own_scheme(p: Problem) -> str | None:
        if scheme and p.scheme != scheme:
            return f"scheme {p.scheme}: this one is for {scheme}"
        return quant_supports(p)

    return Candidate(name, pipeline, QUANT_SHOWS, own_scheme, CLAIMS)
