"""Finding candidates: entry points of installed packages, `module:attribute`, or a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.ranks.crossed import JOIN, cannot_cross, crossed
from moeproof.reference.contract.candidate import Candidate, Pair, RankPair
from moeproof.reference.contract.errors import ContractError, check, known

GROUP = "moeproof.candidates"
"""Entry points of this group are a Candidate, a Pair, a RankPair, an iterable of them, or a function that returns one."""


def find_candidates() -> list[Candidate]:
    """Every single-rank candidate of every installed package, in the order of their names' packages. Names are unique."""
    return [as_candidate(thing) for thing in _installed() if not isinstance(thing, RankPair)]


def find_rank_pairs() -> list[RankPair]:
    """Every candidate for several ranks of every installed package."""
    return [thing for thing in _installed() if isinstance(thing, RankPair)]


def find_crossed_pairs() -> list[RankPair]:
    """Every `PAIR+EXPERTS` of them: each prepare/finalize for several ranks with the experts of each single-rank pair."""
    found = _installed()
    return [
        crossed(ranks, alone)
        for ranks in found
        for alone in found
        if isinstance(ranks, RankPair) and isinstance(alone, Pair) and cannot_cross(ranks, alone) is None
    ]


def _installed() -> list[object]:
    found: dict[str, object] = {}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        try:
            things = _flatten(entry.load())
        except Exception as error:  # a broken third-party package must not take the others down
            raise ContractError(
                f"entry point '{entry.name} = {entry.value}' of group {GROUP} cannot be loaded: {error}"
            ) from error
        for thing in things:
            name = thing.name if isinstance(thing, RankPair) else as_candidate(thing).name
            check(name not in found, f"two installed candidates are named '{name}'")
            found[name] = thing
    return list(found.values())


def _flatten(thing: object) -> list[object]:
    if callable(thing) and not isinstance(thing, (Candidate, Pair, RankPair)):
        thing = thing()
    return list(thing) if isinstance(thing, Iterable) else [thing]


def load_candidates(names: Iterable[str]) -> list[Candidate]:
    """Candidates by name, or by `package.module:attribute` or `path/to/file.py:attribute`."""
    installed = {c.name: c for c in find_candidates()}
    return [_named(name, installed) or replace(as_candidate(_from_path(name)), source=name) for name in names]


def load_rank_pairs(names: Iterable[str]) -> list[RankPair]:
    """Candidates for several ranks, by name or by path, as load_candidates; or `PAIR+EXPERTS`, two installed ones."""
    names = list(names)
    # Every rank loads its candidates anew: paths alone need not import what is installed.
    things = [] if all(":" in name for name in names) else _installed()
    installed = {t.name: t for t in things if isinstance(t, RankPair)}
    experts = {t.name: t for t in things if isinstance(t, Pair)}
    return [
        _crossed(name, installed, experts) or _named(name, installed) or _as_rank_pair(name, _from_path(name)) for name in names
    ]


def _crossed(name: str, installed: dict[str, RankPair], experts: dict[str, Pair]) -> RankPair | None:
    """`PAIR+EXPERTS`; None where the name is no such thing."""
    first, join, second = name.partition(JOIN)
    if not join or ":" in name or name in installed:
        return None
    pair = _named(first, installed)
    assert pair is not None, "a name without a colon is installed, or was refused"
    known("experts", second, experts)
    return crossed(pair, experts[second])


def _as_rank_pair(spec: str, thing: object) -> RankPair:
    if not isinstance(thing, RankPair):
        raise ContractError(f"candidate '{spec}' is a {type(thing).__name__}; a candidate for several ranks is a RankPair")
    return replace(thing, source=spec)


Named = TypeVar("Named", Candidate, RankPair)


def _named(name: str, installed: dict[str, Named]) -> Named | None:
    """The installed candidate of this name; None where the name is a path. Raises ContractError where it is neither."""
    if name in installed:
        return installed[name]
    if ":" not in name:
        near = difflib.get_close_matches(name, installed, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        allowed = ", ".join(installed) or "none is installed"
        raise ContractError(f"candidate '{name}' is not known; allowed: {allowed}, or module:attribute{hint}")
    return None


def load_function(spec: str, what: str) -> Callable[..., object]:
    """What `package.module:attribute` or `path/to/file.py:attribute` names; `what` says in messages what it was for."""
    check(":" in spec, f"{what} '{spec}' must be module:attribute or file.py:attribute")
    thing = _from_path(spec, what)
    check(callable(thing), f"{what} '{spec}' is a {type(thing).__name__}, must be callable")
    return thing  # type: ignore[return-value]


def _from_path(spec: str, what: str = "candidate") -> object:
    where, _, attribute = spec.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ContractError:
        raise
    except Exception as error:  # whatever the user's module does on import, say it in one line
        raise ContractError(f"{what} '{spec}': {where} cannot be imported: {error}") from error
    check(hasattr(module, attribute), f"{what} '{spec}': {where} has no attribute '{attribute}'")
    thing: object = getattr(module, attribute)
    return thing


def _load_file(path: Path) -> object:
    check(path.is_file(), f"candidate file '{path}' does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
