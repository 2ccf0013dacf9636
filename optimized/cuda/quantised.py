"""A layer around the CUDA quantisers, so that they can be judged: QUANT1, and ACT with QUANT2 in one pass.

Products are plain torch in float64 on the decoded operands, an expert at a time: they are exact, slow, and not what is tried.
"""

from __future__ import annotations

from functools import cache

import torch

from moeproof.optimized.cuda import combine, quantise
from moeproof.optimized.cuda.stages import rows as make_rows
from moeproof.optimized.slots import Slots
from moeproof.reference.contract.formats import Format, format_of
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.layouts import unpack_nibbles
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL, Quantiser

Tensor = torch.Tensor


def unsupported(problem: Problem) -> str | None:
    """Why this layer cannot do the problem, or None."""
    p, scheme = problem, problem.quant
    if p.layout != "standard":
        return "this candidate works in the standard layout"
    if scheme.a1 is None or scheme.a2 is None or scheme.w is None:
        return f"scheme {p.scheme} quantises no activations: there is nothing for the CUDA quantisers to do"
    for q in (scheme.a1, scheme.a2):
        if reason := quantise.unsupported(q):
            return reason
    if scheme.w.zero_points or scheme.w.two_level:
        return f"weights of scheme {p.scheme} are not decoded here"
    if p.latent or p.shared or p.weight_on_input or p.router.zero_experts:
        return "routed experts only: no latent projection, shared or identity experts, and no weight on the input"
    return None


@cache
def _values(fmt: Format) -> list[float]:
    """What each code of a 4- or 6-bit float means."""
    half = 1 << (fmt.width - 1)
    steps = [(code & ((1 << fmt.bits) - 1), code >> fmt.bits) for code in range(half)]
    positive = [(m if e == 0 else (m + (1 << fmt.bits)) * 2.0 ** (e - 1)) * fmt.least for m, e in steps]
    return [*positive, *(-x for x in positive)]


def decode(stored: Tensor, fmt: Format) -> Tensor:
    """float64 values of stored codes."""
    if fmt.dtype.is_floating_point:
        return stored.double()
    codes = unpack_nibbles(stored.contiguous()) if fmt.per_byte == 2 else stored
    if fmt.name == "e8m0":
        return torch.exp2(codes.double() - fmt.bias)
    if fmt.integer:
        return codes.double() - fmt.offset
    # Rows that nobody wrote hold any byte; only the format's own bits count.
    return torch.tensor(_values(fmt), dtype=torch.float64, device=stored.device)[codes.long() & ((1 << fmt.width) - 1)]


def dequantise(codes: Tensor, scales: Tensor, q: Quantiser, dtype: Format) -> Tensor:
    """float64 (.., R, C) of stored codes and scales (.., rows, G)."""
    numbers, s = decode(codes, q.format), decode(scales, q.scale_format(dtype))
    for dim, size in ((-2, q.group[0]), (-1, q.group[1])):
        if size != ALL:
            s = s.repeat_interleave(size, dim=dim).narrow(dim, 0, numbers.size(dim))
    return numbers * s


def _product(rows_SA: Tensor, w_eBA: Tensor, local_S: Tensor, bias_eB: Tensor | None) -> Tensor:
    """float64 (S, B): each row with its own expert's weights; zeros where it has none."""
    out = torch.zeros(rows_SA.size(0), w_eBA.size(1), dtype=torch.float64, device=rows_SA.device)
    for expert in range(w_eBA.size(0)):
        y = rows_SA @ w_eBA[expert].T
        y = y if bias_eB is None else y + bias_eB[expert].double()
        out = torch.where((local_S == expert)[:, None], y, out)
    return out


def run(inputs: Inputs) -> dict[str, Tensor]:
    """xq, xs, gate_up, h, hq, hs, y and out."""
    p, x, ids = inputs.problem, inputs.hidden_states, inputs.topk_ids
    a1, a2, w = p.quant.a1, p.quant.a2, p.quant.w
    assert a1 is not None and a2 is not None and w is not None
    assert inputs.w1_scale is not None and inputs.w2_scale is not None
    T, K = ids.shape
    dtype = format_of(x.dtype)
    slots = Slots(ids, p.weight_experts, inputs.w1.size(0), inputs.expert_map)
    known = (ids >= 0) & (ids < p.weight_experts)
    local = ids if inputs.expert_map is None else inputs.expert_map[ids.long().clamp(0, p.weight_experts - 1)]
    local = torch.where(known, local, -1).flatten()

    xq, xs = quantise.quantise(x, a1, inputs.a1_scale)
    rows = dequantise(xq, xs, a1, dtype).repeat_interleave(K, dim=0)
    w1, w2 = (dequantise(c, s, w, dtype) for c, s in ((inputs.w1, inputs.w1_scale), (inputs.w2, inputs.w2_scale)))
    gate_up = _product(rows, w1, local, inputs.b1).to(torch.float32).to(x.dtype)
    h = make_rows(T * K, p.I, x)
    hq, hs = quantise.activate_quantise(gate_up, p.act, a2, slots, inputs.a2_scale, h)
    # Rows of dead slots hold anything: no NaN may come of them.
    hidden = torch.where((local >= 0)[:, None], dequantise(hq, hs, a2, dtype), 0.0)
    y = _product(hidden, w2, local, inputs.b2).to(torch.float32).to(x.dtype)
    out = x if p.inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
    combine.combine(y, inputs.topk_weights, slots, out, scale=p.scale_on_sum)
    scales = hs.view(T, K, hs.size(1)) if a2.by_token else hs.view(1, 1, 1)
    shown = {"gate_up": gate_up.view(T, K, p.N), "h": h.view(T, K, p.I), "hq": hq.view(T, K, hq.size(1)), "hs": scales}
    return {"xq": xq, "xs": xs} | shown | {"y": y.view(T, K, p.H), "out": out}
