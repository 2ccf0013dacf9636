"""Case -> Inputs: the same bytes on every OS, device and torch version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch

from moeproof.harness.cases import routing
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.quant_inputs import quantise_weights, static_scales
from moeproof.harness.cases.values import NO_BIAS, RECIPES, WHOLE, MakeW, stream_owner
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.placement import expert_map
from moeproof.reference.contract.problem import Problem
from moeproof.reference.oracle.rounding import round_to
from moeproof.reference.oracle.router import route

Tensor = torch.Tensor
SHARED = -1
"""The shared expert's number, for recipes that tell experts apart."""
AT_ONCE = 2**27
"""Weights that are quantised together."""


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """All tensors of the case on `device`. Each tensor has its own stream, so shrinking one leaves the others alone."""
    p = case.problem
    make_x, make_w1, make_w2 = RECIPES[case.values]
    device = torch.device(device)

    def stream(name: str) -> Stream:
        return Stream(case.seed, name, device)

    def weights(name: str, rows: int, cols: int, make: MakeW) -> dict[str, Tensor]:
        out = torch.empty(len(p.local), rows, cols, dtype=p.fmt.dtype, device=device)
        for local, expert in enumerate(p.local):
            # One stream per expert: rank r of an expert-parallel world holds the same bytes as a single rank.
            owner = stream_owner(case.values, expert)
            out[local] = _cast(make(p, stream(f"{name}/{owner}"), rows, cols, expert), p)
        if not p.quant.quantised:
            return {name: _stored(out, p)}
        # No scale spans two experts, and float64 values of a whole full-size layer would not fit.
        parts = [quantise_weights(some.double(), name, p) for some in out.split(max(1, AT_ONCE // (rows * cols)))]
        new = parts[0] if len(parts) == 1 else {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        return new | {name: _stored(new[name], p)}

    ids = weights_TK = None
    if case.routing != "router":
        ids, weights_TK = routing.make(p, case.routing, case.values, stream("routing"))
    mapping = expert_map(p.weight_experts, p.ep, p.ep_rank, p.placement)
    inputs = Inputs(
        problem=p,
        hidden_states=_cast(make_x(p, stream("x")), p),
        topk_ids=torch.zeros(p.T, p.slots, dtype=torch.int32, device=device) if ids is None else ids,
        topk_weights=torch.zeros(p.T, p.slots, device=device) if weights_TK is None else weights_TK,
        **weights("w1", p.N, p.hidden, make_w1),
        **weights("w2", p.hidden, p.I, make_w2),
        expert_map=None if mapping is None else mapping.to(device),
        logits=routing.logits(p, case.logits, stream("logits")),
        **_extras(case, stream),
        **static_scales(p, case.values, stream, device),
    )
    if case.routing == "router":
        choice = route(inputs)
        inputs = routing.with_router(inputs, choice.ids, choice.weights)
    if case.huge:
        return _huge(inputs)
    return strided(inputs) if case.strided else inputs


def _cast(x: Tensor, p: Problem) -> Tensor:
    """float64 to the problem's dtype by our own rounding; the final cast is exact."""
    return round_to(x, p.fmt).to(p.fmt.dtype)


def _stored(w: Tensor, p: Problem) -> Tensor:
    """(e, rows, cols) as the problem stores it: KN gives a transposed view of (e, cols, rows) memory."""
    return w if p.storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)


def _extras(case: Case, draw: Callable[[str], Stream]) -> dict[str, Tensor]:
    """The tensors that only some problems have."""
    p, r = case.problem, case.problem.router
    new: dict[str, Tensor] = {}
    make_w1, make_w2 = RECIPES[case.values][1:]
    if p.expert_bias:
        # Large against the products, and in every expert another: a bias counted K times or unweighted must show.
        for name, cols in (("b1", p.N), ("b2", p.hidden)):
            every = draw(name).integers(-2, 3, p.weight_experts, cols).double()
            if case.values not in WHOLE:
                every = draw(name).normal(p.weight_experts, cols)
            if case.values in NO_BIAS:
                every = every * 0
            new[name] = _cast(every, p)[p.local].contiguous()
    if r.bias:
        # Shifted below zero: a rejected group filled with 0 instead of -inf must show.
        new["correction_bias"] = (draw("correction_bias").normal(p.routed_ids) * 0.5 - 1.0).to(torch.float32)
    if r.expert_scale:
        new["expert_scale"] = (0.5 + draw("expert_scale").uniform(p.E)).to(torch.float32)
    if r.table:
        new["table_ids"] = draw("table").integers(0, p.routed_ids, p.T, p.K).to(torch.int32)
    if p.shared:
        new["shared_w1"] = _cast(make_w1(p, draw("shared_w1"), p.act.width_in(p.shared), p.H, SHARED), p)
        new["shared_w2"] = _cast(make_w2(p, draw("shared_w2"), p.H, p.shared, SHARED), p)
    if p.shared_gate:
        new["shared_gate"] = _cast(draw("shared_gate").normal(p.H) / p.H**0.5, p)
    if p.latent:
        new["latent_down"] = _cast(draw("latent_down").normal(p.latent, p.H) / p.H**0.5, p)
        new["latent_up"] = _cast(draw("latent_up").normal(p.H, p.latent) / p.latent**0.5, p)
    if p.latent_norm:
        new["latent_norm"] = _cast(0.5 + draw("latent_norm").uniform(p.latent), p)
    return new


def strided(inputs: Inputs) -> Inputs:
    """Every argument as a view into a larger buffer: a stride in the last dim that is not 1, or rows that are apart.

    int and small float tensors get every second element of a poisoned buffer; the 2-D and 3-D matrices get row gaps, as
    slices of a larger allocation have.
    """
    changed: dict[str, Tensor] = {}
    for name, t in inputs.tensors():
        if name in ("w1", "w2") and inputs.problem.storage == "KN":
            continue
        # Codes and scales are matrices, whatever bytes they are kept in.
        matrix = t.is_floating_point() or name.startswith(("w1", "w2"))
        gap = 8 if t.dim() > 1 and matrix else 0
        step = 1 if gap else 2
        wide = torch.full((*t.shape[:-1], (t.shape[-1] + gap) * step), _poison(t), dtype=t.dtype, device=t.device)
        view = wide[..., : t.shape[-1] * step : step]
        changed[name] = view.copy_(t)
    return inputs.map(changed)


def _huge(inputs: Inputs) -> Inputs:
    """Rows of x and experts of w1 and w2 spread over more than 2^31 elements each; nothing in between is read.

    An offset of row * stride in 32 bits wraps from the last row on. Each of the three spans 4.3 GB in 16 bits, and is
    held three times: here, as the candidate's guarded copy, and as that copy's record.
    """
    spread: dict[str, Tensor] = {}
    for name in ("hidden_states", "w1", "w2"):
        t = getattr(inputs, name)
        if t.shape[0] < 2 or not t.numel():
            continue
        stride = (2**31 // (t.shape[0] - 1) + 16) // 16 * 16
        span = torch.empty((t.shape[0] - 1) * stride + t[0].numel(), dtype=t.dtype, device=t.device)
        spread[name] = span.as_strided(t.shape, (stride, *t.stride()[1:])).copy_(t)
    return inputs.map(spread)


def _poison(t: Tensor) -> float | int:
    return float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max


def digest(inputs: Inputs) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all tensors."""
    sha = hashlib.sha256()
    for name, t in inputs.tensors():
        sha.update(f"{name} {tuple(t.shape)} {t.dtype}\n".encode())
        sha.update(t.detach().cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
