"""The axes of a case, features x shapes x routing x values x memory x layout x dtype x history, and a cover of their pairs.

`covering()` are the cases of the full tier in which every two values of different axes meet, as far as a case with both
exists. Sizes are boundaries: one below, at and above the tiles that kernels use, and no two axes share a size.
"""

from __future__ import annotations

import functools
from dataclasses import fields

from moeproof.harness.cases.case import LOGITS, ROUTINGS, Case
from moeproof.harness.cases.pairwise import Axes, Row, cover
from moeproof.harness.cases.sample import ACTIVATIONS, ROUTERS, SAMPLED_VALUES
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

AXES: Axes = {
    "E": (1, 2, 5, 8, 12, 17, 33, 60),
    "K": (1, 2, 3, 4, 6, 10, 16),
    "router": ROUTERS,
    "act": tuple(dict.fromkeys(ACTIVATIONS)),
    "routing": tuple(ROUTINGS),
    "values": SAMPLED_VALUES,
    "T": (0, 1, 2, 3, 7, 9, 15, 17, 31, 33, 65),
    "H": (16, 24, 40, 64, 72, 104, 128),
    "I": (8, 25, 32, 48, 50, 96, 112),
    "logits": tuple(LOGITS),
    "extra": ("none", "expert_bias", "weight_on_input", "shared", "scale_on_sum", "inplace"),
    "ranks": ("1", "0/2 linear", "1/2 linear", "2/3 round_robin"),
    "memory": ("plain", "strided", "KN"),
    "layout": ("standard", "batched"),
    "dtype": ("bf16", "fp16", "fp32"),
    "also": ("none", "permute", "duplicate", "split", "relabel", "flip", "double", "interleave"),
}
"""`extra` is one feature that is on; `ranks` is rank/world and placement; `also` is the relation, or the history."""
DEFAULTS: Row = {
    "E": 33,
    "K": 2,
    "router": "softmax",
    "act": "silu",
    "routing": "uniform",
    "values": "normal",
    "T": 9,
    "H": 40,
    "I": 32,
    "logits": "normal",
    "extra": "none",
    "ranks": "1",
    "memory": "plain",
    "layout": "standard",
    "dtype": "bf16",
    "also": "none",
}
"""What stands for an axis that is not chosen yet."""
COUPLED = ("E", "K", "router")
"""Axes that exclude each other beyond what one default could stand for."""
_activation, _router = functools.cache(Activation.parse), functools.cache(Router.parse)
CONSTRAINED = (*COUPLED, "act", "routing", "values", "extra", "ranks", "also", "logits")
"""Axes of which some values exclude each other; the others go with everything."""
EXTRAS = {"expert_bias": True, "weight_on_input": True, "shared": 20, "scale_on_sum": 2.5, "inplace": True}


def build(row: Row, seed: int = 0) -> Case:
    """The case of a whole row. Raises ContractError where no such case exists."""
    rank, _, rest = str(row["ranks"]).partition("/")
    world, _, placement = rest.partition(" ")
    extra, also = str(row["extra"]), str(row["also"])
    problem = Problem(
        **{size: row[size] for size in ("T", "H", "I", "E", "K")},  # type: ignore[arg-type]
        dtype=str(row["dtype"]),
        act=_activation(str(row["act"])),
        router=_router(str(row["router"])),
        layout=str(row["layout"]),
        storage="KN" if row["memory"] == "KN" else "NK",
        ep=int(world or 1),
        ep_rank=int(rank) if world else 0,
        placement=placement or "linear",
        **({} if extra == "none" else {extra: EXTRAS[extra]}),  # type: ignore[arg-type]
    )
    return Case(
        problem,
        values=str(row["values"]),
        routing=str(row["routing"]),
        logits=str(row["logits"]),
        relation="none" if also == "interleave" else also,
        history="interleave" if also == "interleave" else "none",
        strided=row["memory"] == "strided",
        seed=seed,
    )


def possible(row: Row) -> bool:
    """Whether some case has these values: tried with the defaults, and with every E, K and router for those not chosen."""
    free = tuple(axis for axis in COUPLED if axis not in row)
    return _exists(tuple((axis, row[axis]) for axis in CONSTRAINED if axis in row), free)


@functools.lru_cache(maxsize=1 << 16)
def _exists(chosen: tuple[tuple[str, object], ...], free: tuple[str, ...]) -> bool:
    row = DEFAULTS | dict(chosen)
    return _completes(row, dict(chosen), free)


def _completes(row: Row, chosen: Row, free: tuple[str, ...]) -> bool:
    if not free:
        for act in (row["act"],) if "act" in chosen else ("silu", "silu:limit=1", "gelu"):
            for routing in (row["routing"],) if "routing" in chosen else ("uniform", "router"):
                try:
                    build(row | {"act": act, "routing": routing})
                except ContractError:
                    continue
                return True
        return False
    axis, *rest = free
    first = DEFAULTS[axis]
    return any(_completes(row | {axis: value}, chosen, tuple(rest)) for value in (first, *AXES[axis]))


@functools.lru_cache(maxsize=1)
def covering() -> tuple[Case, ...]:
    """The cover's cases; the seed of each is its place."""
    rows, _ = cover(AXES, possible)
    return tuple(build(row, seed) for seed, row in enumerate(rows))


assert set(DEFAULTS) == set(AXES) and {f.name for f in fields(Case)} >= {"relation", "history"}
