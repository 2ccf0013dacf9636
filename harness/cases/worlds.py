"""Case on several ranks -> the Inputs of each: slices of the very bytes that the single-rank case has."""

from __future__ import annotations

from dataclasses import replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs, strided
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.world import rank_seed
from moeproof.reference.ranks.split import rank_inputs


def whole_case(case: Case) -> Case:
    """The same layer on one rank, in one plain call: what the ranks together must compute."""
    if case.ranks == 1:
        return case
    return replace(case, ranks=1, spread="even", tp=1, sp=0, redundant=0, relation="none", history="none")


def make_world_inputs(case: Case, device: torch.device | str = "cpu") -> list[Inputs]:
    """Inputs of every rank, in rank order. With ranks=1 the list holds make_inputs(case)."""
    whole = make_inputs(replace(whole_case(case), strided=False), device)
    ranks = [rank_inputs(case.world, whole, rank) for rank in range(case.ranks)]
    return [strided(inputs) for inputs in ranks] if case.strided else ranks


def make_rank_inputs(case: Case, rank: int, device: torch.device | str = "cpu") -> Inputs:
    """One rank's Inputs alone: the same as make_world_inputs(case)[rank], but that only its own experts' weights are drawn.

    With replicas or shards the whole layer is drawn all the same.
    """
    world = case.world
    if world.redundant or world.tp > 1 or world.ranks == 1:
        return make_world_inputs(case, device)[rank]
    mine = replace(whole_case(case), strided=False).with_problem(ep=world.ranks, ep_rank=rank)
    part = make_inputs(mine, device)
    rows = world.rows(rank)
    named = ("hidden_states", "topk_ids", "topk_weights", "logits", "table_ids")
    own = {name: t[rows].clone() for name, t in part.tensors() if name in named}
    inputs = replace(part.map(own), problem=world.rank_problem(rank))
    return strided(inputs) if case.strided else inputs


def seeds(case: Case) -> list[int]:
    """One seed per rank, for what a rank draws itself; derived from the case's, and printed in reports."""
    return [rank_seed(case.seed, rank) for rank in range(case.ranks)]
