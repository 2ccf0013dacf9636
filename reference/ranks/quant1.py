"""QUANT1 on simulated ranks: the codes and scales that each pair must arrive with, by the rule that a candidate declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import ALL
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.quant_stages import quant1, quant1_input
from moeproof.reference.oracle.quantise import Quantised, quantise
from moeproof.reference.ranks.dispatch import Pair

Tensor = torch.Tensor


def arriving(world: World, ranks: Sequence[Inputs], at: Sequence[Sequence[Pair]], rule: str) -> list[Quantised | None]:
    """For each rank the operand (pairs, H) that its pairs must bring, in their order; None where x is not quantised.

    `at` are the pairs that each rank receives, `rule` is a word of contract.candidate.QUANT1.
    """
    q = world.problem.quant.a1
    if q is None:
        return [None for _ in at]
    by_tensor = not q.by_token and not q.static
    if rule == "arrival":
        rows = [quant1_input(inputs) for inputs in ranks]
        given = ranks[0].a1_scale
        static = None if given is None else given.double()
        return [quantise(_rows(rows, pairs), q, world.problem.fmt, static) for pairs in at]
    sent = _of_one_tensor(world, ranks) if rule == "world" and by_tensor else [quant1(inputs) for inputs in ranks]
    if rule == "source" and by_tensor:
        sent = [replace(s, quantiser=replace(q, group=(1, ALL)), s=s.s.expand(s.q.shape[0], 1)) for s in sent]
    return [_gathered(sent, pairs) for pairs in at]


def _of_one_tensor(world: World, ranks: Sequence[Inputs]) -> list[Quantised]:
    """Every rank's share of the quantised tensor that all ranks' tokens make together."""
    q, rows = world.problem.quant.a1, [quant1_input(inputs) for inputs in ranks]
    assert q is not None
    whole = quantise(torch.cat(rows), q, world.problem.fmt)
    assert whole.defined is not None
    sizes = [len(r) for r in rows]
    parts = zip(whole.q.split(sizes), whole.defined.split(sizes), strict=True)
    return [replace(whole, q=codes, defined=defined) for codes, defined in parts]


def _gathered(sent: Sequence[Quantised], pairs: Sequence[Pair]) -> Quantised:
    codes, defined = _rows([s.q for s in sent], pairs), _rows([s.defined for s in sent if s.defined is not None], pairs)
    scales = _rows([s.s for s in sent], pairs) if sent[0].quantiser.by_token else sent[0].s
    return replace(sent[0], q=codes, s=scales, defined=defined)


def _rows(by_rank: Sequence[Tensor], pairs: Sequence[Pair]) -> Tensor:
    """(pairs, ..): the row of each pair's token among its source's (T, ..)."""
    first = [0, *accumulate(len(rows) for rows in by_rank)]
    index = torch.tensor([first[p.source] + p.token for p in pairs], dtype=torch.int64, device=by_rank[0].device)
    return torch.cat(list(by_rank))[index]
