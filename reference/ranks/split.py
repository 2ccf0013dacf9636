"""The whole layer's tensors -> what one rank is given: its rows, its experts' weights, its shard of I, physical ids."""

from __future__ import annotations

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.schemes import ALL
from moeproof.reference.contract.shards import gate_up_rows
from moeproof.reference.contract.world import World

Tensor = torch.Tensor
BY_TOKEN = ("hidden_states", "topk_weights", "logits", "table_ids")


def rank_inputs(world: World, whole: Inputs, rank: int) -> Inputs:
    """Inputs of `rank`, made from those of the single-rank problem (all tokens, all experts). Copies, contiguous.

    Shared expert, latent projections, router parameters and the static scale of x are replicated. A bias of GEMM2 belongs to
    the first shard only: shards are summed. Scales, zero points and global scales go with their experts, and with the groups
    that a shard holds whole. `w1` keeps the memory order of the problem's storage.
    """
    p, grid = whole.problem, world.grid
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
    change |= _weights(whole, "w1", experts, gate_up, slice(0, p.hidden))
    change |= _weights(whole, "w2", experts, torch.arange(p.hidden, device=whole.device), columns)
    if whole.b1 is not None:
        change["b1"] = whole.b1[experts][:, gate_up].contiguous()
    if whole.b2 is not None:
        first = grid.tp_rank(rank) == 0
        change["b2"] = whole.b2[experts] if first else torch.zeros_like(whole.b2[experts])
    if whole.a2_scale is not None and whole.a2_scale.dim() == 3:
        change["a2_scale"] = whole.a2_scale[experts]
    mapping = grid.expert_map(rank)
    change["expert_map"] = None if mapping is None else mapping.to(whole.device)
    return Inputs(**{**dict(whole.tensors()), **change, "problem": world.rank_problem(rank)})  # type: ignore[arg-type]


def _weights(whole: Inputs, name: str, experts: Tensor, rows: Tensor, columns: slice) -> dict[str, Tensor]:
    """w1 or w2 of `experts`, cut to `rows` and `columns` of the unquantised matrix, with all that belongs to it."""
    p, q, w = whole.problem, whole.problem.quant.w, getattr(whole, name)
    if q is None:
        return {name: _stored(w[experts][:, rows][:, :, columns], p)}
    cut = {name: _stored(_take(w, experts, rows, _units(columns, q.format.per_byte)), p)}
    high, wide = q.group
    groups = slice(None) if wide == ALL else _units(columns, wide)
    one = torch.zeros(1, dtype=torch.int64, device=rows.device)
    cut[f"{name}_scale"] = _take(getattr(whole, f"{name}_scale"), experts, one if high == ALL else rows[::high] // high, groups)
    if q.zero_points:
        cut[f"{name}_zp"] = _take(getattr(whole, f"{name}_zp"), experts, rows[::2] // 2, groups)
    if q.two_level:
        cut[f"{name}_global"] = getattr(whole, f"{name}_global")[experts]
    return cut


def _units(columns: slice, size: int) -> slice:
    """Which groups of `size` columns hold these columns."""
    return slice(columns.start // size, -(-columns.stop // size))


def _take(t: Tensor, experts: Tensor, rows: Tensor, columns: slice) -> Tensor:
    """t[experts][:, rows][:, :, columns]. By bytes where an element is one: not every narrow dtype can be indexed."""
    flat = t.view(torch.uint8) if t.dtype.itemsize == 1 else t
    return flat[experts][:, rows][:, :, columns].contiguous().view(t.dtype)


def _stored(w: Tensor, p: Problem) -> Tensor:
    return w.contiguous() if p.storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)
