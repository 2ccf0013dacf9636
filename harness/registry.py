"""Finding candidates: entry points of installed packages, `module:attribute`, or a file."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from moeproof.harness.pairs import as_candidate
from moeproof.reference.contract.candidate import Candidate, Pair, RankPair
from moeproof.reference.contract.errors import ContractError, check

GROUP = "moeproof.candidates"
"""Entry points of this group are a Candidate, a Pair, a RankPair, an iterable of them, or a function that returns one."""


def find_candidates() -> list[Candidate]:
    """Every single-rank candidate of every installed package, in the order of their names' packages. Names are unique."""
    return [as_candidate(thing) for thing in _installed() if not isinstance(thing, RankPair)]


def find_rank_pairs() -> list[RankPair]:
    """Every candidate for several ranks of every installed package."""
    return [thing for thing in _installed() if isinstance(thing, RankPair)]


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
    chosen: list[Candidate] = []
    installed = {c.name: c for c in find_candidates()}
    for name in names:
        if name in installed:
            chosen.append(installed[name])
        elif ":" in name:
            chosen.append(_from_path(name))
        else:
            near = difflib.get_close_matches(name, installed, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            allowed = ", ".join(installed) or "none is installed"
            raise ContractError(f"candidate '{name}' is not known; allowed: {allowed}, or module:attribute{hint}")
    return chosen


def _from_path(spec: str) -> Candidate:
    where, _, attribute = spec.rpartition(":")
    try:
        module = _load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ContractError:
        raise
    except Exception as error:  # whatever the user's module does on import, say it in one line
        raise ContractError(f"candidate '{spec}': {where} cannot be imported: {error}") from error
    check(hasattr(module, attribute), f"candidate '{spec}': {where} has no attribute '{attribute}'")
    return replace(as_candidate(getattr(module, attribute)), source=spec)


def _load_file(path: Path) -> object:
    check(path.is_file(), f"candidate file '{path}' does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module
