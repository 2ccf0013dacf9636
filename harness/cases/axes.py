"""The axes of a case, features x shapes x scheme x routing x values x memory x ranks x history, and a cover of their pairs.

`covering()` are cases in which every two values of different axes meet, as far as a case with both exists. Sizes are
boundaries: one below, at and above the tiles that kernels use, and above 3 no two dimensions of a case are equal. The cases
are stored (covering.json, written by ci/cover.py), since finding them takes minutes; a test counts their pairs.
"""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path

from moeproof.harness.cases.case import HISTORIES, LOGITS, RELATIONS, ROUTINGS, VALUES, Case, parse_case
from moeproof.harness.cases.pairwise import Axes, Row
from moeproof.harness.cases.sample import ACTIVATIONS, ROUTERS
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.schemes import SCHEMES

EXTRAS: dict[str, dict[str, object]] = {
    "none": {},
    "expert_bias": {"expert_bias": True},
    "weight_on_input": {"weight_on_input": True},
    "shared": {"shared": 22},
    "shared_gate": {"shared": 22, "shared_gate": True},
    "scale_on_sum": {"scale_on_sum": 2.5},
    "inplace": {"inplace": True},
    "latent": {"latent": 36},
}
"""One feature that is on."""
SHARES: dict[str, dict[str, object]] = {
    "1": {},
    "0/2 linear": {"ep": 2, "ep_rank": 0},
    "1/2 linear": {"ep": 2, "ep_rank": 1},
    "2/3 round_robin": {"ep": 3, "ep_rank": 2, "placement": "round_robin"},
}
"""One rank, and a rank's share of the experts without the others."""
WORLDS: dict[str, dict[str, object]] = {
    "2 even": {"ranks": 2},
    "3 uneven": {"ranks": 3, "spread": "uneven"},
    "3 redundant": {"ranks": 3, "redundant": 2},
    "4 empty tp": {"ranks": 4, "spread": "empty", "tp": 2},
    "4 uneven tp sp": {"ranks": 4, "spread": "uneven", "tp": 2, "sp": 1},
    "5 one": {"ranks": 5, "spread": "one"},
    "8 round_robin": {"ranks": 8, "spread": "uneven", "placement": "round_robin"},
}
"""Ranks that dispatch to each other."""
AXES: Axes = {
    "E": (1, 2, 5, 8, 12, 18, 34, 60, 144),
    "K": (1, 2, 3, 4, 6, 10, 16),
    "router": ROUTERS,
    "act": tuple(dict.fromkeys(ACTIVATIONS)),
    "scheme": tuple(SCHEMES),
    "routing": tuple(ROUTINGS),
    "values": tuple(name for name in VALUES if name != "sweep"),
    "T": (0, 1, 2, 3, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 130),
    "H": (24, 40, 72, 80, 104, 128, 160),
    "I": (14, 25, 32, 48, 50, 96, 112, 256),
    "logits": tuple(LOGITS),
    "extra": tuple(EXTRAS),
    "ranks": (*SHARES, *WORLDS),
    "memory": ("plain", "strided", "KN"),
    "layout": ("standard", "batched"),
    "dtype": ("bf16", "fp16", "fp32"),
    "relation": tuple(RELATIONS),
    "history": tuple(HISTORIES),
}
"""values=sweep wants one expert and 2^17 gates, and huge=1 a GPU of 80 GB: they are tiers of their own."""
ANYWHERE: Axes = {
    **AXES,
    "ranks": tuple(SHARES),
    "relation": tuple(name for name in RELATIONS if name != "ranks"),
    "history": ("none", "interleave"),
}
"""What one rank without a GPU can run: all its pairs meet there, so that none of them waits for a machine that has more."""
DEFAULTS: Row = {
    "E": 34,
    "K": 2,
    "router": "softmax",
    "act": "silu",
    "scheme": "none",
    "routing": "uniform",
    "values": "normal",
    "T": 9,
    "H": 128,
    "I": 256,
    "logits": "normal",
    "extra": "none",
    "ranks": "1",
    "memory": "plain",
    "layout": "standard",
    "dtype": "bf16",
    "relation": "none",
    "history": "none",
}
"""What stands for an axis that is not chosen yet. These widths suit every scheme."""
OTHERWISE: Axes = {
    "E": (34, 60, 144),
    "K": (2, 1),
    "router": ("softmax", "sqrtsoftplus:table:renorm=eps/1e-20", "softmax:bias:zero_experts=4:scale=6"),
    "act": ("silu", "silu:limit=1", "gelu"),
    "scheme": ("none", "fp8_token", "mxfp8"),
    "routing": ("uniform", "dup"),
    "ranks": ("1", "2 even"),
}
"""What else may stand for it: between them they go with every value of every other axis that anything goes with."""
ROWS, WEIGHTS = 20_000, 18_000_000
"""Most rows of a batched buffer and most weights of a case: a second or two for a laptop."""
_activation, _router = functools.cache(Activation.parse), functools.cache(Router.parse)


def build(row: Row, seed: int = 0) -> Case:
    """The case of a whole row. Raises ContractError where no such case exists."""
    share = SHARES.get(str(row["ranks"]), {})
    world = dict(WORLDS.get(str(row["ranks"]), {}))
    check(not (world and row["history"] == "stream"), "history=stream is judged on one rank")
    if "placement" in world:
        share = {"placement": world.pop("placement")}
    problem = Problem(
        **{size: row[size] for size in ("T", "H", "I", "E", "K")},  # type: ignore[arg-type]
        dtype=str(row["dtype"]),
        scheme=str(row["scheme"]),
        act=_activation(str(row["act"])),
        router=_router(str(row["router"])),
        layout=str(row["layout"]),
        storage="KN" if row["memory"] == "KN" else "NK",
        **share,  # type: ignore[arg-type]
        **EXTRAS[str(row["extra"])],  # type: ignore[arg-type]
    )
    rows = len(problem.local) * problem.rows_per_expert if problem.layout == "batched" else 0
    check(rows <= ROWS, f"a batched buffer of {rows} rows: at most {ROWS} here")
    weights = problem.E * (problem.N + problem.I) * problem.H
    check(weights <= WEIGHTS, f"{weights} weights: at most {WEIGHTS} here")
    recipes = {name: str(row[name]) for name in ("values", "routing", "logits", "relation", "history")}
    return Case(problem, **recipes, strided=row["memory"] == "strided", seed=seed, **world)  # type: ignore[arg-type]


def row_of(case: Case) -> Row:
    """The row that this case was built from: what it covers is read off the case itself."""
    p = case.problem
    memory = "strided" if case.strided else "KN" if p.storage == "KN" else "plain"
    axes: Row = {name: getattr(p, name) for name in ("E", "K", "T", "H", "I", "scheme", "layout", "dtype")}
    axes |= {name: getattr(case, name) for name in ("values", "routing", "logits", "relation", "history")}
    axes["router"] = next(name for name in ROUTERS if _router(name) == p.router)
    axes["act"] = next(name for name in ACTIVATIONS if _activation(name) == p.act)
    axes["extra"] = _named(EXTRAS, p, case)
    axes["ranks"] = _named(SHARES | WORLDS, p, case)
    return {axis: axes.get(axis, memory) for axis in AXES}


def _named(table: dict[str, dict[str, object]], p: Problem, case: Case) -> str:
    """The row of a table whose settings these are; settings that it does not name are the defaults."""
    names = {name for row in table.values() for name in row}
    plain = {name: getattr(Problem if hasattr(p, name) else Case, name) for name in names}
    own = {name: getattr(p if hasattr(p, name) else case, name) for name in names}
    return next(label for label, row in table.items() if plain | row == own)


def possible(row: Row) -> bool:
    """Whether some case has these values: tried with the defaults for those not chosen, and with what else may stand there."""
    return _exists(tuple((axis, row[axis]) for axis in AXES if axis in row))


@functools.lru_cache(maxsize=1 << 18)
def _exists(chosen: tuple[tuple[str, object], ...]) -> bool:
    row = DEFAULTS | dict(chosen)
    free = [axis for axis in OTHERWISE if axis not in dict(chosen)]
    for values in itertools.product(*(OTHERWISE[axis] for axis in free)):
        try:
            build(row | dict(zip(free, values, strict=True)))
        except ContractError:
            continue
        return True
    return False


@functools.lru_cache(maxsize=1)
def covering() -> tuple[Case, ...]:
    """The stored cases: first those that one rank without a GPU can run, then those of several ranks, streams and graphs.

    Of the former the vacuity gate refuses none that something else could have stood for.
    """
    lines = json.loads((Path(__file__).parent / "covering.json").read_text(encoding="utf-8"))
    return tuple(parse_case(line) for line in lines)


assert set(DEFAULTS) == set(AXES)
