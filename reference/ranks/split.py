"""The whole layer's tensors -> what one rank is given: its rows, its experts' weights, its shard of I, physical ids."""

from __future__ import annotations

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.world import World

Tensor = torch.Tensor
BY_TOKEN = ("hidden_states", "topk_weights", "logits", "table_ids")


def rank_inputs(world: World, whole: Inputs, rank: int) -> Inputs:
    """Inputs of `rank`, made from those of the single-rank problem (all tokens, all experts). Copies, contiguous.

    Shared expert, latent projections and router parameters are replicated. A bias of GEMM2 belongs to the first shard only:
    shards are summed. `w1` keeps the memory order of the problem's storage.
    """
    p, grid = whole.problem, world.grid
    check(not p.quant.quantised, f"scheme {p.scheme}: scales are not shared out among ranks yet; allowed: none")
    rows = world.rows(rank)
    experts = torch.tensor([grid.logical_of(e) for e in grid.local(rank)], device=whole.device)
    columns = grid.columns(p.I, rank)
    change: dict[str, Tensor | None] = {}
    for name, tensor in whole.tensors():
        if name in BY_TOKEN:
            change[name] = tensor[rows].clone()
    if world.redundant:
        change["logits"] = change["table_ids"] = change["correction_bias"] = change["expert_scale"] = None
    change["topk_ids"] = grid.physical(whole.topk_ids[rows].clone(), rank)
    gate_up = gate_up_rows(p, columns, whole.device)
    change["w1"] = _stored(whole.w1[experts][:, gate_up], p)
    change["w2"] = _stored(whole.w2[experts][:, :, columns], p)
    if whole.b1 is not None:
        change["b1"] = whole.b1[experts][:, gate_up].contiguous()
    if whole.b2 is not None:
        first = grid.tp_rank(rank) == 0
        change["b2"] = whole.b2[experts] if first else torch.zeros_like(whole.b2[experts])
    mapping = grid.expert_map(rank)
    change["expert_map"] = None if mapping is None else mapping.to(whole.device)
    return Inputs(**{**dict(whole.tensors()), **change, "problem": world.rank_problem(rank)})  # type: ignore[arg-type]


def gate_up_rows(p: Problem, columns: slice, device: torch.device) -> Tensor:
    """int64: rows of w1 that make the intermediate `columns`: gate and up of each, in the activation's packing."""
    wanted = torch.arange(columns.start, columns.stop, device=device)
    if not p.act.gated:
        return wanted
    if p.act.interleaved:
        return torch.stack([2 * wanted, 2 * wanted + 1], dim=1).flatten()
    return torch.cat([wanted, p.I + wanted])


def _stored(w: Tensor, p: Problem) -> Tensor:
    return w.contiguous() if p.storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)
