"""Routing recipes: which experts each token names, and with what weights.

Weights are drawn independently of the logits, of order one and pairwise apart by at least 1.2: with logit-derived weights
a skewed routing gives the second slot a weight near 0, and nothing wrong in it can be seen.
"""

from __future__ import annotations

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.values import EXACT_WEIGHTS
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem

Tensor = torch.Tensor
RUNS = [16, 17, 15, 1, 31, 32, 33]
"""Tokens of one expert in routing=tile: a tile of 16 or 32, one more, one less."""


def _distinct(p: Problem, s: Stream, weights: Tensor) -> Tensor:
    """int64 (T, K): K experts per token without replacement, favouring large `weights` (E,).

    Each expert's key is a uniform divided by its weight, smallest first: for small keys the exponential race of weighted
    sampling, without its logarithm, whose last bit differs between machines.
    """
    keys = (1.0 - s.uniform(p.T, p.routed_ids)) / weights
    return torch.argsort(keys, dim=1, stable=True)[:, : p.K]


def _uniform(p: Problem, s: Stream) -> Tensor:
    return _distinct(p, s, torch.ones(p.routed_ids, dtype=torch.float64, device=s.device))


def _zipf(p: Problem, s: Stream) -> Tensor:
    return _distinct(p, s, 1.0 / torch.arange(1, p.routed_ids + 1, device=s.device).double())


def _hot(p: Problem, s: Stream) -> Tensor:
    ids = _uniform(p, s)
    return _first_slot(ids, int(s.integers(0, p.E, 1)))


def _first_slot(ids: Tensor, hot: int) -> Tensor:
    """Slot 0 is the same expert for every token; the rest are distinct others."""
    clash = (ids == hot).nonzero()
    ids[clash[:, 0], clash[:, 1]] = ids[clash[:, 0], 0]
    ids[:, 0] = hot
    return ids


def _empty(p: Problem, s: Stream) -> Tensor:
    weights = torch.ones(p.routed_ids, dtype=torch.float64, device=s.device)
    for expert in (0, p.E // 2, p.E - 1):
        weights[expert] = 2.0**-1000
    return _distinct(p, s, weights)


def _minus1(p: Problem, s: Stream) -> Tensor:
    ids = _uniform(p, s)
    ids[s.integers(0, 5, p.T, p.K) == 0] = -1
    ids[p.T - (p.T + 7) // 8 :] = -1
    return ids


def _dup(p: Problem, s: Stream) -> Tensor:
    """Each slot drawn alone, so that tokens name an expert twice; the first token names one expert K times."""
    ids = s.integers(0, p.routed_ids, p.T, p.K)
    ids[:1] = ids[:1, :1]
    return ids


def _none(p: Problem, s: Stream) -> Tensor:
    return torch.full((p.T, p.K), -1, dtype=torch.int64, device=s.device)


def _tile(p: Problem, s: Stream) -> Tensor:
    """Runs of tokens share an expert; slot k names the k-th expert after it. Run lengths are about multiples of a tile,
    and so are their sums.
    """
    owner: list[int] = []
    for i, run in enumerate(RUNS * (p.T // sum(RUNS) + 1)):
        owner += [i % p.E] * run
    first = torch.tensor(owner[: p.T], dtype=torch.int64, device=s.device) + s.integers(0, p.E, 1)
    return (first[:, None] + torch.arange(p.K, device=s.device)) % p.E


def _pair(p: Problem, s: Stream) -> Tensor:
    """The first two slots are experts h and h + 1 for every token; with one slot, tokens take them in turn, two to one."""
    hot = int(s.integers(0, p.E, 1))
    if p.K == 1:
        turn = (torch.arange(p.T, device=s.device) % 3 == 2).long()
        return ((hot + turn) % p.E)[:, None]
    # The rest come from the other E - 2, in an order of their own: 0, 1, .. are hot + 2, hot + 3, ..
    rest = s.shuffled(p.T, max(p.E - 2, 1))[:, : p.K - 2]
    two = torch.tensor([hot, (hot + 1) % p.E], device=s.device).expand(p.T, 2)
    return torch.cat([two, (rest + hot + 2) % p.E], dim=1)


def _trailing(p: Problem, s: Stream) -> Tensor:
    ids = _uniform(p, s)
    ids[(p.T + 1) // 2 :] = -1
    return ids


def _beyond(p: Problem, s: Stream) -> Tensor:
    """Ids just past the last expert and far past it: stale slots are not always -1."""
    ids = _uniform(p, s)
    past = p.named_ids + s.integers(0, 3, p.T, p.K) * 2**9
    return torch.where(s.integers(0, 5, p.T, p.K) == 0, past, ids)


def _paired(ids: Tensor, p: Problem) -> Tensor:
    """Every second slot goes to the partner of the slot before it: experts 2i and 2i + 1 are partners."""
    ids = ids.clone()
    for slot in range(1, ids.shape[1], 2):
        before = ids[:, slot - 1]
        partner = before ^ 1
        fits = (before >= 0) & (partner < p.E) & (ids[:, slot] >= 0)
        ids[:, slot] = torch.where(fits, partner, ids[:, slot])
    return ids


IDS = {
    "uniform": _uniform,
    "zipf": _zipf,
    "hot": _hot,
    "empty": _empty,
    "minus1": _minus1,
    "dup": _dup,
    "none": _none,
    "tile": _tile,
    "pair": _pair,
    "hot_first": lambda p, s: _first_slot(_uniform(p, s), 0),
    "hot_middle": lambda p, s: _first_slot(_uniform(p, s), p.E // 2),
    "hot_last": lambda p, s: _first_slot(_uniform(p, s), p.E - 1),
    "trailing": _trailing,
    "beyond": _beyond,
}


def slot_weights(p: Problem, s: Stream) -> Tensor:
    """float64 (T, K): 1.25^-j for a random permutation of the slots j, with up to 4% jitter, so that no two are alike."""
    order = s.shuffled(p.T, p.K).double()
    steps = torch.ones(p.T, p.K, dtype=torch.float64, device=s.device)
    for j in range(1, p.K):
        steps = torch.where(order >= j, steps * 0.8, steps)
    return steps * (1.0 + 0.04 * s.uniform(p.T, p.K))


def exact_weights(p: Problem, s: Stream) -> Tensor:
    """float64 (T, K): distinct powers of two, for the recipes in which everything must be exact."""
    return 2.0 ** -(s.shuffled(p.T, p.K) % 6).double()


def make(p: Problem, routing: str, values: str, s: Stream) -> tuple[Tensor, Tensor]:
    """(topk_ids int32 (T, K'), topk_weights float32 (T, K')); K' counts the fused shared experts' slots.

    Weights of slots that are not routed are NaN: they must not matter.
    """
    ids = IDS[routing](p, s)
    weights = exact_weights(p, s) if values in EXACT_WEIGHTS else slot_weights(p, s)
    if values == "cancel":
        ids = _paired(ids, p)
        # Partners' weights differ by less than bf16 resolves: 1 + 2^-9 .. 1 + 2^-8.
        nudge = 2.0**-9 * (1.0 + s.uniform(p.T, p.K // 2))
        weights[:, 1::2] = weights[:, 0 : p.K // 2 * 2 : 2] * (1.0 + nudge)
    if p.router.fused_shared:
        extra = torch.arange(p.E, p.weight_experts, device=s.device).expand(p.T, -1)
        ids = torch.cat([ids, extra], dim=1)
        weights = torch.cat([weights, torch.ones_like(extra, dtype=torch.float64)], dim=1)
    live = (ids >= 0) & (ids < p.named_ids)
    weights = torch.where(live, weights, torch.nan)
    return ids.to(torch.int32), weights.to(torch.float32)


def logits(p: Problem, recipe: str, s: Stream) -> Tensor:
    """float32 (T, E + zero experts)."""
    x = s.normal(p.T, p.routed_ids) * 2
    if recipe == "ties":
        x = s.integers(-2, 3, p.T, p.routed_ids).double()
    elif recipe == "deep":
        x = x - 110
    elif recipe == "nan":
        odd = s.integers(0, 4, p.T)
        column = s.integers(0, p.routed_ids, p.T)
        rows = torch.arange(p.T, device=s.device)
        x[rows[odd == 1], column[odd == 1]] = torch.nan
        x[rows[odd == 2], column[odd == 2]] = torch.inf
        x[rows[odd == 3]] = torch.nan
    return x.to(torch.float32)


def with_router(inputs: Inputs, ids: Tensor, weights: Tensor) -> Inputs:
    """The same inputs with a router's own choice."""
    return inputs.map({"topk_ids": ids.to(torch.int32), "topk_weights": weights.to(torch.float32)})
