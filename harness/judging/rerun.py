"""The oracle's own stages run again with one fault in them: wrong results as a broken kernel would really give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from moeproof.harness.judging.expect import JUDGED
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.oracle import activations
from moeproof.reference.oracle.chain import finish, known, project
from moeproof.reference.oracle.experts import by_expert, input_rows, local_ids
from moeproof.reference.oracle.products import decoded
from moeproof.reference.oracle.quant_stages import quant1, quant2, weight

Tensor = torch.Tensor
TILES = (64, 16)
"""Widths of K tiles; the first that leaves more than one tile is used."""
SWAPPED = "gate and up swapped"


def tail(length: int) -> int:
    """Columns in the last K tile: 40 of 104, 64 of 128, 16 of 32, 8 of 8."""
    for tile in TILES:
        rest = length - (length - 1) // tile * tile
        if rest < length:
            return rest
    return length


def without_tail(x: Tensor, columns: int) -> Tensor:
    """The last columns zero: what a product sees whose inner loop stops short."""
    x = x.clone()
    x[..., x.shape[-1] - columns :] = 0
    return x


def swapped(gate_up: Tensor, p: Problem) -> Tensor:
    """Gate and up exchanged, in the packing of the activation."""
    if p.act.interleaved:
        return torch.stack([gate_up[..., 1::2], gate_up[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)


def _without_last_slot(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, -1] = 0
    return y


def _unharmed(x: Tensor) -> Tensor:
    return x


def neighbour_scales(inputs: Inputs, name: str) -> Inputs:
    """Each scale of weight `name` where its neighbour's belongs: along groups, else rows, else experts."""
    scale = getattr(inputs, f"{name}_scale")
    dim = next((d for d in (2, 1, 0) if scale.shape[d] > 1), 0)
    # float8 tensors have no roll.
    rolled = scale.view(torch.uint8).roll(1, dim).view(scale.dtype) if scale.element_size() == 1 else scale.roll(1, dim)
    return inputs.map({f"{name}_scale": rolled})


@dataclass(frozen=True)
class Fault:
    """The stage that makes tensor `breaks` works on harmed input, or with the harmed scales of weight `scales`."""

    breaks: str
    harm: Callable[[Tensor], Tensor] = _unharmed
    scales: str = ""


def faults_of(p: Problem) -> dict[str, Fault]:
    """The structural faults of the L0 gate (docs/tolerances.md), by what a report calls them."""
    first, second = tail(p.hidden), tail(p.I)
    faults = {
        f"the last K tile ({first} of {p.hidden}) of GEMM1 dropped": Fault("gate_up", lambda x: without_tail(x, first)),
        f"the last K tile ({second} of {p.I}) of GEMM2 dropped": Fault("y", lambda h: without_tail(h, second)),
        "the last slot missing": Fault("out", _without_last_slot),
    }
    if p.act.gated:
        faults[SWAPPED] = Fault("h", lambda gate_up: swapped(gate_up, p))
    if p.quant.quantised:
        faults["neighbour scales in GEMM1"] = Fault("gate_up", scales="w1")
        faults["neighbour scales in GEMM2"] = Fault("y", scales="w2")
    return faults


def rerun(name: str, fault: Fault, start: Tensor, inputs: Inputs, claims: Claims) -> Tensor:
    """float64 `name` before it is rounded, from `start`, the input of the broken stage (the hidden states for GEMM1)."""
    value = fault.harm(_entering(fault.breaks, start.double(), inputs))
    broken = neighbour_scales(inputs, fault.scales) if fault.scales else inputs
    value = run_stage(fault.breaks, value, broken, claims)
    for stage in JUDGED[JUDGED.index(fault.breaks) + 1 : JUDGED.index(name) + 1]:
        value = run_stage(stage, _entering(stage, value, inputs), inputs, claims)
    return value


def _entering(stage: str, x: Tensor, inputs: Inputs) -> Tensor:
    """What a stage reads: where the scheme quantises its input, the values that the codes stand for."""
    scheme = inputs.problem.quant
    if stage == "gate_up" and scheme.a1 is not None:
        return decoded(quant1(inputs)).values
    if stage == "y" and scheme.a2 is not None:
        return decoded(quant2(inputs, x)).values
    return x


def run_stage(name: str, x: Tensor, inputs: Inputs, claims: Claims) -> Tensor:
    """The exact result of one stage, without its error."""
    p = inputs.problem
    if name == "gate_up":
        if p.latent:
            assert inputs.latent_down is not None
            x = project(x, inputs.latent_down, p.fmt).value
        rows = input_rows(inputs, x) if p.quant.a1 is None else x[:, None].expand(*inputs.topk_ids.shape, -1)
        return _grouped(rows, "w1", inputs.b1, p.N, inputs)
    if name == "h":
        return activations.exact(x, p.act)
    if name == "y":
        return _grouped(x, "w2", inputs.b2, p.hidden, inputs)
    return finish(inputs, known(x), claims).value


def _grouped(rows_TKA: Tensor, name: str, bias_eB: Tensor | None, width: int, inputs: Inputs) -> Tensor:
    """float64 (T, K, width): each live row times its expert's weights, plus its bias."""
    local = local_ids(inputs)
    out = torch.zeros(*local.shape, width, dtype=torch.float64, device=rows_TKA.device)
    for expert, tokens, slots in by_expert(local, inputs.w1.shape[0]):
        quantised = inputs.problem.quant.quantised
        w = decoded(weight(inputs, name, expert)).values if quantised else getattr(inputs, name)[expert].double()
        y = rows_TKA[tokens, slots] @ w.T
        out[tokens, slots] = y if bias_eB is None else y + bias_eB[expert].double()
    return out
