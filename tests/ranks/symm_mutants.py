"""Faults of the exchange, each one exact textual substitution in a kernel's source, on the ranks that run it.

`{n}` in the new text is a number: the mutant's, or one that changes nothing (the neutral twin of the same edit).
"""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import symm_functions
from symm_functions import Shown

from moeproof.harness.judging.pairs import Tap, forward
from moeproof.harness.ranks import RankContext

PACKAGE = "moeproof.optimized.symm"
USERS = ("signals", "dispatch", "combine", "exchange", "room")
UNEVEN = ("routing=uniform,spread=uneven", "routing=dup,spread=uneven,seed=9")
"""Rank 1 has 7 tokens, and then 3."""


@dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    old: str
    new: str
    n: int
    twin: int
    caught: str
    """What the answer must hold: words of a refusal or of a finding."""
    late: str = ""
    """Before which step of each call the guilty rank sleeps: a rank that hurries past a meeting must have something to miss."""
    calls: tuple[str, ...] = ("routing=uniform", "routing=dup,seed=9")


MUTANTS = (
    Mutant(
        "a signal is missing",
        "signals",
        "        tl.atomic_xchg(there, 2 * call",
        "        if (me == r) | (me != {n}):\n            tl.atomic_xchg(there, 2 * call",
        1,
        9,
        "waited 0.1 s for the rows (dispatch) of rank 1 in call 1",
    ),
    Mutant(
        "a signal of the call before",
        "signals",
        "        tl.atomic_xchg(there, 2 * call",
        "        tl.atomic_xchg(there, 2 * (call - (me == {n}).to(tl.int32))",
        1,
        9,
        "waited 0.1 s for the rows (dispatch) of rank 1 in call 1",
    ),
    Mutant(
        "a stale signal is good enough for rows",
        "signals",
        "seen = wait_for(here, 2 * call, limit, CLOCK)",
        "seen = tl.maximum(wait_for(here, 2 * call - 2 * {n} * (MEETING == 0), limit, CLOCK), 2 * call * {n})",
        1,
        0,
        "DISPATCH",
        late="prepare",
    ),
    Mutant(
        "a stale signal is good enough for sums",
        "signals",
        "seen = wait_for(here, 2 * call, limit, CLOCK)",
        "seen = tl.maximum(wait_for(here, 2 * call - 2 * {n} * MEETING, limit, CLOCK), 2 * call * {n})",
        1,
        0,
        "COMBINE",
        late="finalize",
    ),
    Mutant(
        "the first program signals, not the last",
        "signals",
        "== tl.num_programs(0) - 1",
        "== (tl.num_programs(0) - 1) * (1 - {n})",
        1,
        0,
        "in the same launch",
    ),
    Mutant(
        "a row in the next token's place",
        "dispatch",
        "at = (region + token) * row_words",
        "at = (region + (token + {n}) % most) * row_words",
        1,
        0,
        "DISPATCH",
    ),
    Mutant(
        "ids in another rank's region",
        "dispatch",
        "place = (region + token)[:, None] * K + slot",
        "place = ((region + {n} * most) % (RANKS * most) + token)[:, None] * K + slot",
        1,
        0,
        "DISPATCH",
    ),
    Mutant(
        "ids of an earlier call stay",
        "dispatch",
        "for first in range(T * K + program * FILL, most * K,",
        "for first in range(T * K + program * FILL, most * K * (1 - {n}),",
        1,
        0,
        "DISPATCH",
        calls=UNEVEN,
    ),
    Mutant(
        "counts of an earlier call are added",
        "dispatch",
        "tl.store(tally + first + e, 0, mask=first + e < E)",
        "tl.store(tally + first + e, 0, mask=first + e < E * (1 - {n}))",
        1,
        0,
        "expert_num_tokens",
    ),
    Mutant(
        "a rank that is not needed gets the row",
        "dispatch",
        "tl.where(here, expert, -1), mask=live)",
        "tl.where(here | (group >= 0) & ({n} == 1), expert, -1), mask=live)",
        1,
        0,
        "DISPATCH",
    ),
    Mutant(
        "sums under another rank's name",
        "combine",
        "mine = me.to(tl.int64) * most * H",
        "mine = (me.to(tl.int64) + {n}) % RANKS * most * H",
        1,
        0,
        "COMBINE",
    ),
    Mutant(
        "the last slot is left out",
        "combine",
        "                    total += value",
        "                    total += tl.where(k == K - {n}, 0.0, value)",
        1,
        0,
        "COMBINE",
    ),
)
BY_NAME = {mutant.name: mutant for mutant in MUTANTS}


@contextmanager
def planted(mutant: Mutant, n: int) -> Iterator[None]:
    """The mutated module's kernels in the place of the healthy ones, in this process."""
    modules = {name: importlib.import_module(f"{PACKAGE}.{name}") for name in USERS}
    source = Path(modules[mutant.module].__file__ or "").read_text()
    assert source.count(mutant.old) == 1, f"{mutant.name}: the text is there {source.count(mutant.old)} times"
    before: list[tuple[Any, str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{mutant.module}_mutated.py"
        path.write_text(source.replace(mutant.old, mutant.new.replace("{n}", str(n))))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        changed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(changed)
        kernels = [k for k, v in vars(changed).items() if type(v).__name__ == "InterpretedFunction"]
        own = [name for name in kernels if vars(changed)[name].fn.__module__ == changed.__name__]
        try:
            for module in modules.values():
                for name in own:
                    if hasattr(module, name):
                        before.append((module, name, getattr(module, name)))
                        setattr(module, name, getattr(changed, name))
            yield
        finally:
            for module, name, value in before:
                setattr(module, name, value)


class Sleepy:
    """Forwards everything; the guilty rank comes late to one method."""

    def __init__(self, inner: object, method: str) -> None:
        self._inner, self._method = inner, method

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name != self._method:
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            time.sleep(0.3)
            return value(*arguments, **options)

        return call


def mutated(context: RankContext, pair: str, name: str, twin: bool, lines: Sequence[str]) -> tuple[str, list[Shown]]:
    """(what ended the calls early, what each showed)."""
    mutant = BY_NAME[name]
    symm_functions.pair_of(context, pair)  # chooses the mode before anything imports Triton
    shown: list[Shown] = []
    with planted(mutant, mutant.twin if twin else mutant.n):
        kernel = symm_functions.kernel_of(context, pair, lines[0], 20.0 if twin else 0.1)
        front, experts = Tap(kernel.prepare_finalize, ("prepare",)), Tap(kernel.fused_experts, ("apply",))
        late = context.rank == symm_functions.GUILTY and bool(mutant.late)
        kernel.prepare_finalize = Sleepy(front, mutant.late) if late else front  # type: ignore[assignment]
        kernel.fused_experts = experts  # type: ignore[assignment]
        for line in lines:
            try:
                out = forward(kernel, symm_functions.made(context, line), None)
                front.settle()
            except Exception as error:  # whatever it is: the test looks for its words
                return str(error), shown
            rows, _, counts, ids, weights = front.calls["prepare"][1]
            taken = {"rows": rows, "expert_num_tokens": counts, "row_ids": ids, "row_weights": weights}
            shown.append({k: t for k, t in taken.items() if t is not None} | {"out": out, "y": experts.calls["apply"][1]})
    return "", shown
