"""The quantised experts of a whole layer, stage by stage, in canonical (token, slot) coordinates."""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.quantise import Matrix, activations, matmul, plain, quantise, weights

Tensor = torch.Tensor


def _weights(inputs: Inputs, name: str, expert: int) -> Matrix:
    q = inputs.problem.quant.w
    assert q is not None
    t = {n: None if (v := getattr(inputs, f"{name}{n}")) is None else v[expert] for n in ("", "_scale", "_zp", "_global")}
    assert t[""] is not None and t["_scale"] is not None
    return weights(t[""], t["_scale"], t["_zp"], t["_global"], q, inputs.problem.fmt.dtype)


def run(inputs: Inputs, source: Tensor, local_TK: Tensor) -> dict[str, Tensor]:
    """xq, xs, gate_up, h, hq, hs and y of `source` (T, H): what QUANT1 quantises, weighted already where that is asked."""
    p, scheme, dtype = inputs.problem, inputs.problem.quant, inputs.problem.fmt.dtype
    T, K = local_TK.shape
    shows: dict[str, Tensor] = {}
    if scheme.a1 is not None:
        shows["xq"], shows["xs"] = quantise(source, scheme.a1, dtype, inputs.a1_scale)
    gate_up = torch.zeros(T, K, p.N, dtype=dtype, device=source.device)
    h = torch.zeros(T, K, p.I, dtype=dtype, device=source.device)
    y = torch.zeros(T, K, p.hidden, dtype=dtype, device=source.device)
    experts = [(expert, local_TK == expert) for expert in range(inputs.w1.size(0))]
    for expert, here in experts:
        if not bool(here.any()):
            continue
        tokens = here.nonzero()[:, 0]
        if scheme.a1 is None:
            x = plain(source[tokens])
        else:
            xs = shows["xs"][tokens] if scheme.a1.by_token else shows["xs"]
            x = activations(shows["xq"][tokens], xs, scheme.a1, dtype, inputs.a1_scale)
        gate_up[here] = matmul(x, _weights(inputs, "w1", expert), _row(inputs.b1, expert)).to(dtype)
        h[here] = activate(gate_up[here], p.act).to(dtype)
    given = _slot_scale(inputs, local_TK)
    if scheme.a2 is not None:
        hq, hs = quantise(h.flatten(0, 1), scheme.a2, dtype, given)
        shows["hq"] = hq.view(T, K, hq.size(1))
        shows["hs"] = hs.view(T, K, hs.size(1)) if scheme.a2.by_token else hs.view(1, 1, 1)
    for expert, here in experts:
        if not bool(here.any()):
            continue
        if scheme.a2 is None:
            rows = plain(h[here])
        else:
            hs = shows["hs"][here] if scheme.a2.by_token else shows["hs"][0]
            g = None if given is None or not scheme.a2.two_level else given.view(T, K, 1)[here]
            rows = activations(shows["hq"][here], hs, scheme.a2, dtype, g)
        y[here] = matmul(rows, _weights(inputs, "w2", expert), _row(inputs.b2, expert)).to(dtype)
    return shows | {"gate_up": gate_up, "h": h, "y": y}


def _row(t: Tensor | None, expert: int) -> Tensor | None:
    return None if t is None else t[expert]


def _slot_scale(inputs: Inputs, local_TK: Tensor) -> Tensor | None:
    """a2_scale for rows (T * K, .): (1, 1), or (T * K, 1) from one per local expert."""
    given = inputs.a2_scale
    if given is None or given.dim() == 2:
        return given
    return given.flatten()[local_TK.flatten().clamp(min=0)][:, None]
