"""Quantised weights and static activation scales of a case."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moeproof.harness.cases import pinned
from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import Quantiser
from moeproof.reference.oracle.quantise import quantise

Tensor = torch.Tensor
X_REACH, H_REACH = 61.0, 57.0
"""What a static scale maps to the format's maximum: 4 times and more beyond ordinary values, so that a dynamic scale in its
place gives other codes, and below what heterogeneous values reach, so that some saturate."""


def quantise_weights(values: Tensor, name: str, p: Problem) -> dict[str, Tensor]:
    """float64 (e, rows, cols) in the problem's dtype -> codes, scales, zero points and global scales under their names."""
    q = p.quant.w
    assert q is not None
    made = quantise(values, q, p.fmt)
    new = {name: made.codes(), f"{name}_scale": made.scale(p.fmt)}
    zero_points = made.zero_points()
    if zero_points is not None:
        new[f"{name}_zp"] = zero_points
    if made.g is not None:
        new[f"{name}_global"] = made.g.to(torch.float32)
    return new


def static_scales(p: Problem, values: str, draw: Callable[[str], Stream], device: torch.device) -> dict[str, Tensor]:
    """a1_scale and a2_scale, where the scheme is static. They are facts of the layer: the same on every rank."""
    scheme, new = p.quant, {}
    probe = pinned.static_scales(p) if values == "pin" and scheme.a2 is not None else None
    for place, (name, q, reach) in enumerate((("a1_scale", scheme.a1, X_REACH), ("a2_scale", scheme.a2, H_REACH))):
        if q is None or not q.static:
            continue
        one = probe[place] if probe is not None else _scale(q, reach)
        scale = torch.full((1, 1), one, dtype=torch.float64, device=device)
        if q.two_level and name == "a2_scale":
            factor = torch.ones(p.weight_experts, dtype=torch.float64, device=device)
            if probe is None:
                factor += draw("a2_scale").uniform(p.weight_experts)
            else:
                factor *= 2.0 ** (torch.arange(p.weight_experts, device=device) % 3).double()
            factor = factor if q.rule == "two_level_decode" else 1 / factor
            scale = (one * factor)[p.local][:, None, None]
        new[name] = scale.to(torch.float32)
    return new


def _scale(q: Quantiser, reach: float) -> float:
    if not q.two_level:
        return reach / q.format.max
    full = q.format.max * 448
    return reach / full if q.rule == "two_level_decode" else full / reach
