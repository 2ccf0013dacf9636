"""QUANT1 and QUANT2, and what the quantised operands of a call stand for."""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import ALL, Quantiser
from moeproof.reference.oracle.experts import live_slots, local_ids, weighed
from moeproof.reference.oracle.quantise import Quantised, dequantise, quantise

Tensor = torch.Tensor


def quant1_input(inputs: Inputs) -> Tensor:
    """float64 (T, H): what QUANT1 quantises. Weighted where the weight is on the input, and then rounded to the dtype.

    Quantising comes before dispatch, so a token counts wherever its expert lives; one that is not routed is a row of zeros.
    """
    x = inputs.hidden_states.double()
    if not inputs.problem.weight_on_input:
        return x
    routed = (inputs.topk_ids >= 0) & (inputs.topk_ids < inputs.problem.named_ids)
    weight = torch.where(routed, inputs.topk_weights.double(), 0.0)
    return weighed(torch.where(routed, x, 0.0), weight, inputs.problem.fmt)


def quant1(inputs: Inputs) -> Quantised:
    """QUANT1: x (T, H) -> codes and scales."""
    q, given = inputs.problem.quant.a1, inputs.a1_scale
    assert q is not None
    return quantise(quant1_input(inputs), q, inputs.problem.fmt, None if given is None else given.double())


def slot_scale(inputs: Inputs, given: Tensor | None) -> Tensor | None:
    """a2_scale as it applies to h (T, K, .): float64 (1, 1, 1), or (T, K, 1) from one per local expert."""
    if given is None:
        return None
    if given.dim() == 2:
        return given.double()[None]
    return given.double().flatten()[local_ids(inputs).clamp(min=0)][..., None]


def _with_slots(q: Quantised, shape: tuple[int, int]) -> Quantised:
    """Rows (T * K, .) back to (T, K, .); one scale for the whole tensor becomes (1, 1, 1)."""
    s = q.s.unflatten(0, shape) if q.quantiser.by_token else q.s[None]
    assert q.defined is not None
    return Quantised(q.quantiser, q.q.unflatten(0, shape), s, None, q.g, q.defined.unflatten(0, shape))


def quant2(inputs: Inputs, h_TKI: Tensor) -> Quantised:
    """QUANT2: h (T, K, I), in whatever dtype it was kept -> codes and scales. Rows that are not live count as zeros."""
    q = inputs.problem.quant.a2
    assert q is not None
    live = live_slots(inputs)[..., None]
    h = torch.where(live, h_TKI.double(), 0.0)
    given = slot_scale(inputs, inputs.a2_scale)
    if q.by_token:
        return quantise(h, q, inputs.problem.fmt, given)
    assert q.group == (ALL, ALL)
    return _with_slots(quantise(h.flatten(0, 1), q, inputs.problem.fmt, None if given is None else given[0]), (*h.shape[:2],))


def shown1(inputs: Inputs, codes: Tensor, scale: Tensor) -> Quantised:
    """A candidate's own xq and xs."""
    q = inputs.problem.quant.a1
    assert q is not None
    return dequantise(q, inputs.problem.fmt, codes, scale, g=inputs.a1_scale if q.two_level else None)


def shown2(inputs: Inputs, codes: Tensor, scale: Tensor) -> Quantised:
    """A candidate's own hq and hs."""
    q = inputs.problem.quant.a2
    assert q is not None
    return dequantise(q, inputs.problem.fmt, codes, scale, g=slot_scale(inputs, inputs.a2_scale) if q.two_level else None)


def weight(inputs: Inputs, name: str, expert: int) -> Quantised:
    """w1 or w2 of one local expert (rows, columns), decoded."""
    q = inputs.problem.quant.w
    assert q is not None

    def of(field: str) -> Tensor | None:
        t = getattr(inputs, field)
        return None if t is None else t[expert]

    codes, scale = of(name), of(f"{name}_scale")
    assert codes is not None and scale is not None
    return dequantise(q, inputs.problem.fmt, codes, scale, of(f"{name}_zp"), of(f"{name}_global"))


def store_scale(q: Quantised, inputs: Inputs) -> Tensor:
    """The scales of xq or hq as they are stored."""
    return q.scale(inputs.problem.fmt)


__all__ = ["Quantiser", "quant1", "quant1_input", "quant2", "shown1", "shown2", "slot_scale", "store_scale", "weight"]
