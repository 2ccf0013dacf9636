"""Simpler cases than a given one, in the order in which shrinking tries them: structure first, then size, then recipes.

Each axis offers its own values, the simplest first, so that one accepted step can jump all the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

_Make = Callable[[], Case]
FEATURES = (
    "latent_norm",
    "latent",
    "shared_gate",
    "shared",
    "expert_bias",
    "weight_on_input",
    "inplace",
    "capacity",
    "scale_on_sum",
)
"""Features of a problem that can be switched off, one by one."""
ROUTER_FEATURES = ("fused_shared", "zero_experts", "expert_scale", "table", "softcap", "multiplier", "scale", "bias")
SIZES = ("E", "K", "T", "I", "H")
SIMPLE: dict[str, tuple[object, ...]] = {
    "values": ("int", "normal"),
    "routing": ("uniform", "hot_first", "dup", "minus1"),
    "logits": ("normal", "ties"),
    "relation": ("none",),
    "history": ("none",),
    "strided": (False,),
    "huge": (False,),
}
"""Simple values of each recipe, the simplest first; what comes after the case's own is not tried."""
SEEDS = range(4)
FEW = (1, 2, 3, 4)
"""Token counts to which every failure should come down."""


def reductions(case: Case) -> Iterator[tuple[str, Case]]:
    """(axis, simpler case), all of them possible ones."""
    for axis, changed in _all(case):
        try:
            simpler = changed()
        except ContractError:
            continue  # that combination does not exist
        if simpler != case:
            yield axis, simpler


def _all(case: Case) -> Iterator[tuple[str, _Make]]:
    p = case.problem
    yield "ranks", _with(case, ep=1, ep_rank=0, placement="linear")
    yield from _fewer_ranks(case)
    for size in SIZES:
        for value in smaller(getattr(p, size)):
            yield size, _sized(case, size, value)
        if size == "T":
            yield from _fewer_tokens(case)
    yield from _scheme_off(case)
    yield from _features(case)
    for field, simple in SIMPLE.items():
        own = getattr(case, field)
        for simple_value in simple[: simple.index(own)] if own in simple else simple:
            yield field, _recipe(case, field, simple_value)
    for field, default in (("storage", "NK"), ("layout", "standard"), ("dtype", "bf16"), ("placement", "linear")):
        yield field, _with(case, **{field: default})
    if case.seed:
        yield "seed", _recipe(case, "seed", 0)


def _fewer_ranks(case: Case) -> Iterator[tuple[str, _Make]]:
    """Fewer ranks, two at least; without shards, replicas and an uneven spread. On one rank it would be another question."""
    if case.ranks == 1:
        return
    for ranks in smaller(case.ranks):
        if ranks > 1:
            yield "ranks", lambda n=ranks: replace(case, ranks=n, tp=1, sp=0)  # type: ignore[misc]
            yield "ranks", _recipe(case, "ranks", ranks)
    yield "tp", lambda: replace(case, tp=1, sp=0)
    for field, simple in (("sp", 0), ("redundant", 0), ("spread", "even")):
        yield field, _recipe(case, field, simple)


def smaller(size: int) -> list[int]:
    """Sizes to try instead, the smallest first: a few landmarks, then fractions of what is there, then one less."""
    landmarks = [0, 1, 2, 3, 4, 8, 16, 17, 32, 33, 64, 65]
    tries = [n for n in landmarks if n <= size // 2] + [size // 2, size * 3 // 4, size - 1]
    return [n for n in dict.fromkeys(tries) if 0 <= n < size]


def _fewer_tokens(case: Case) -> Iterator[tuple[str, _Make]]:
    """A few tokens that other seeds draw: what needs a certain token may be met again among them."""
    for tokens in FEW:
        if tokens < case.problem.T:
            for seed in SEEDS:
                if seed != case.seed:
                    yield "T and seed", lambda t=tokens, s=seed: replace(case.with_problem(T=t), seed=s)  # type: ignore[misc]


def _features(case: Case) -> Iterator[tuple[str, _Make]]:
    p = case.problem
    plain = Problem(T=p.T, H=p.H, I=p.I, E=p.E, K=p.K)
    yield "router", _with(case, router=Router())
    for name in ROUTER_FEATURES:
        yield f"router {name}", _with_router(case, name)
    yield (
        "router groups",
        lambda: case.with_problem(router=replace(p.router, groups=0, keep=0, group_score="max", rejected="neginf")),
    )
    yield "router renorm", lambda: case.with_problem(router=replace(p.router, renorm="none", renorm_value=0.0))
    for name in FEATURES:
        yield name, _with(case, **{name: getattr(plain, name)})
    if str(p.act) != "silu":
        yield "activation", _with(case, act=Activation())
        if not p.act.gated:
            yield "activation", _with(case, act=Activation("relu_no_mul"))
        if p.act.limit and p.act.name == "silu":
            yield "activation limit", _with(case, act=replace(p.act, limit=0.0))


def _scheme_off(case: Case) -> Iterator[tuple[str, _Make]]:
    """Nothing quantised; with plain values where the recipe is about scales."""
    if case.problem.scheme != "none":
        yield "scheme", _with(case, scheme="none")
        yield "scheme", lambda: replace(case, problem=replace(case.problem, scheme="none"), values="normal")


def _with(case: Case, **changes: object) -> _Make:
    return lambda: case.with_problem(**changes)


def _sized(case: Case, size: str, value: int) -> _Make:
    """One size changed; a rank count or slot count that no longer fits follows it."""
    changes: dict[str, object] = {size: value}
    if size == "E" and value < case.problem.K:
        changes["K"] = max(value, 1)
    return lambda: case.with_problem(**changes)


def _with_router(case: Case, name: str) -> _Make:
    router = case.problem.router
    return lambda: case.with_problem(router=replace(router, **{name: getattr(Router(), name)}))


def _recipe(case: Case, field: str, value: object) -> _Make:
    return lambda: replace(case, **{field: value})  # type: ignore[arg-type]
