"""A quantised pipeline in plain float32 with every stage replaceable: tests plant faults by replacing one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeproof.harness.judging.compare import Comparison
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.verdict import Finding
from moeproof.reference.contract import Claims, Inputs, Quantiser
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.quantise import Matrix, activations, decode, matmul, plain, quantise, weights

Tensor = torch.Tensor
Codes = tuple[Tensor, Tensor]


def quantise_rows(x: Tensor, q: Quantiser, given: Tensor | None) -> Codes:
    return quantise(x, q, x.dtype, given)


def rows_matrix(codes: Tensor, scale: Tensor, q: Quantiser, g: Tensor | None, dtype: torch.dtype) -> Matrix:
    return activations(codes, scale, q, dtype, g)


def weight_matrix(inputs: Inputs, name: str, expert: int) -> Matrix:
    t = {n: None if (v := getattr(inputs, f"{name}{n}")) is None else v[expert] for n in ("", "_scale", "_zp", "_global")}
    return weights(t[""], t["_scale"], t["_zp"], t["_global"], inputs.problem.quant.w, inputs.problem.fmt.dtype)  # type: ignore[arg-type]


@dataclass(frozen=True)
class QuantPipeline:
    """One function per step. `dead` fills the rows of h that are not live."""

    quant1: Callable[[Tensor, Quantiser, Tensor | None], Codes] = quantise_rows
    quant2: Callable[[Tensor, Quantiser, Tensor | None], Codes] = quantise_rows
    rows1: Callable[..., Matrix] = rows_matrix
    rows2: Callable[..., Matrix] = rows_matrix
    weights: Callable[[Inputs, str, int], Matrix] = weight_matrix
    product: Callable[[Matrix, Matrix], Tensor] = matmul
    dead: float = 0.0

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        p, dtype = inputs.problem, inputs.problem.fmt.dtype
        a1, a2, (T, K) = p.quant.a1, p.quant.a2, inputs.topk_ids.shape
        shown: dict[str, Tensor] = {}
        ids = inputs.topk_ids.flatten()
        token = torch.arange(T * K) // K
        if a1 is not None:
            xq, xs = self.quant1(inputs.hidden_states, a1, inputs.a1_scale)
            shown |= {"xq": xq, "xs": xs}
        gate_up, h = torch.zeros(T * K, p.N, dtype=dtype), torch.full((T * K, p.I), self.dead, dtype=dtype)
        for expert in range(inputs.w1.shape[0]):
            rows = (ids == expert).nonzero()[:, 0]
            if a1 is None:
                x = plain(inputs.hidden_states[token[rows]])
            else:
                scale = xs[token[rows]] if a1.by_token else xs
                g = inputs.a1_scale if a1.two_level else None
                x = self.rows1(xq[token[rows]], scale, a1, g, dtype)
            gate_up[rows] = self.product(x, self.weights(inputs, "w1", expert)).to(dtype)
            h[rows] = activate(gate_up[rows], p.act).to(dtype)
        y = torch.zeros(T * K, p.H, dtype=dtype)
        given = inputs.a2_scale
        if given is not None and given.dim() == 3:
            given = given.flatten()[ids.clamp(min=0).long()][:, None]
        if a2 is not None:
            hq, hs = self.quant2(h, a2, given)
            shown |= {"hq": hq.view(T, K, -1), "hs": hs.view(T, K, -1) if a2.by_token else hs.view(1, 1, 1)}
        for expert in range(inputs.w1.shape[0]):
            rows = (ids == expert).nonzero()[:, 0]
            if a2 is None:
                operand = plain(h[rows])
            else:
                g = None if given is None or not a2.two_level else given[rows]
                operand = self.rows2(hq[rows], hs[rows] if a2.by_token else hs, a2, g, dtype)
            y[rows] = self.product(operand, self.weights(inputs, "w2", expert)).to(dtype)
        three = {"gate_up": gate_up, "h": h, "y": y}
        return shown | {name: t.view(T, K, -1) for name, t in three.items()}


def planted(**steps: object) -> QuantPipeline:
    return replace(QuantPipeline(), **steps)  # type: ignore[arg-type]


def judged(run: Callable[[Inputs], dict[str, Tensor]], inputs: Inputs) -> dict[str, Comparison]:
    return judge_shown(run(inputs), Expectation(inputs, Claims()))[0]


def first_finding(run: Callable[[Inputs], dict[str, Tensor]], inputs: Inputs) -> Finding | None:
    """The finding of the earliest stage, None where all is well."""
    found = [f for r in judged(run, inputs).values() for f in r.findings]
    order = ("xs", "xq", "gate_up", "h", "hs", "hq", "y")
    return min(found, key=lambda f: order.index(f.tensor), default=None)


__all__ = ["QuantPipeline", "decode", "first_finding", "judged", "planted"]
