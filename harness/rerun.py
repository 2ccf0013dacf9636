"""The oracle's own stages run again with one fault in them: wrong results as a broken kernel would really give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.oracle import activations
from moeproof.reference.oracle.chain import finish, known, project
from moeproof.reference.oracle.experts import gemm1_exact, gemm2_exact

Tensor = torch.Tensor
TILES = (64, 16)
"""Widths of K tiles; the first that leaves more than one tile is used."""


def tail(length: int) -> int:
    """Columns in the last K tile: 40 of 104, 64 of 128, 16 of 32, 8 of 8."""
    for tile in TILES:
        rest = length - (length - 1) // tile * tile
        if rest < length:
            return rest
    return length


@dataclass(frozen=True)
class Fault:
    """What is broken. The columns are those left out at the end of a GEMM's inner dimension."""

    gemm1_tail: int = 0
    halves_swapped: bool = False
    gemm2_tail: int = 0
    last_slot_missing: bool = False


def faults_of(p: Problem) -> dict[str, Fault]:
    """The structural faults of the L0 gate (docs/tolerances.md), by what a report calls them."""
    faults = {
        f"the last K tile ({tail(p.hidden)} of {p.hidden}) of GEMM1 dropped": Fault(gemm1_tail=tail(p.hidden)),
        f"the last K tile ({tail(p.I)} of {p.I}) of GEMM2 dropped": Fault(gemm2_tail=tail(p.I)),
        "the last slot missing": Fault(last_slot_missing=True),
    }
    if p.act.gated:
        faults["gate and up swapped"] = Fault(halves_swapped=True)
    return faults


def _without_tail(x: Tensor, columns: int) -> Tensor:
    if not columns:
        return x
    x = x.clone()
    x[..., x.shape[-1] - columns :] = 0
    return x


def rerun(name: str, given: Mapping[str, Tensor], inputs: Inputs, claims: Claims, fault: Fault) -> Tensor:
    """float64 `name` before it is rounded, from the nearest tensor of `given` that lies before it, with the fault."""
    p = inputs.problem

    def before(upstream: str) -> Tensor:
        if upstream in given:
            return given[upstream].double()
        return rerun(upstream, given, inputs, claims, fault)

    if name == "gate_up":
        x = inputs.hidden_states.double()
        if p.latent:
            assert inputs.latent_down is not None
            x = project(x, inputs.latent_down, p.fmt).value
        gate_up = gemm1_exact(inputs, _without_tail(x, fault.gemm1_tail), claims)[0]
        return swapped(gate_up, p) if fault.halves_swapped else gate_up
    if name == "h":
        gate_up = before("gate_up")
        if fault.halves_swapped and "gate_up" in given:
            gate_up = swapped(gate_up, p)
        return activations.exact(gate_up, p.act)
    if name == "y":
        return gemm2_exact(inputs, _without_tail(before("h"), fault.gemm2_tail), claims)[0]
    y = before("y")
    if fault.last_slot_missing:
        y = y.clone()
        y[:, -1] = 0
    return finish(inputs, known(y), claims).value


def swapped(gate_up: Tensor, p: Problem) -> Tensor:
    """Gate and up exchanged, in the packing of the activation."""
    if p.act.interleaved:
        return torch.stack([gate_up[..., 1::2], gate_up[..., 0::2]], dim=-1).flatten(-2)
    return torch.cat(gate_up.chunk(2, dim=-1)[::-1], dim=-1)
