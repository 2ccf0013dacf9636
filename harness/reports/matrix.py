"""The CI matrix: candidates x presets x dtypes x layouts x modes as data, and every cell a verdict or a reason."""

from __future__ import annotations

import json as jsonlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from moeproof.harness import modes, workers
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.presets import PRESETS, preset, scaled
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import find_candidates
from moeproof.harness.reports import report
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import ContractError, check, known
from moeproof.reference.contract.problem import DTYPES, LAYOUTS

CONFIG = Path("ci/matrix.json")
MODES = {"interpret": "on the CPU, Triton kernels interpreted", "device": "compiled, on an NVIDIA GPU"}


class State(str, Enum):
    PASS = "PASS"
    FAIL = "FAIL"
    UNSUPPORTED = "UNSUPPORTED"
    NOT_RUN = "NOT RUN"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Cell:
    candidate: str
    preset: str
    dtype: str
    layout: str
    mode: str

    def __str__(self) -> str:
        return f"{self.candidate} {self.preset} {self.dtype} {self.layout} {self.mode}"

    def case(self, tokens: int, full_size: bool) -> Case:
        """The preset's scaled twin, or the layer at its true size."""
        problem = preset(self.preset)
        sized = replace(problem, T=tokens) if full_size else scaled(problem, T=tokens)
        return Case(replace(sized, dtype=self.dtype, layout=self.layout))


@dataclass(frozen=True)
class CellResult:
    """What came of a cell. All but PASS carry a reason."""

    cell: Cell
    state: State
    reason: str = ""
    verdict: Verdict | None = None

    def __post_init__(self) -> None:
        if self.state is not State.PASS and not self.reason:
            raise ValueError(f"impossible result of {self.cell}: {self.state} needs a reason")
        if self.state in (State.PASS, State.FAIL) and self.verdict is None:
            raise ValueError(f"impossible result of {self.cell}: {self.state} needs a verdict")


@dataclass(frozen=True)
class Block:
    """A product of presets, dtypes, layouts and modes. Empty presets stands for all of them."""

    presets: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16",)
    layouts: tuple[str, ...] = tuple(LAYOUTS)
    modes: tuple[str, ...] = tuple(MODES)

    def __post_init__(self) -> None:
        for what, allowed in (("preset", PRESETS), ("dtype", DTYPES), ("layout", LAYOUTS), ("mode", MODES)):
            values = getattr(self, f"{what}s")
            check(bool(values) or what == "preset", f"a block of the matrix has an empty list of {what}s")
            for value in values:
                known(what, value, allowed)


@dataclass(frozen=True)
class Config:
    """ci/matrix.json. Empty candidates stands for all installed ones; cells past the time limit are NOT RUN."""

    blocks: tuple[Block, ...] = (Block(),)
    candidates: tuple[str, ...] = ()
    tokens: int = 8
    time_limit_s: float = 1200.0

    def __post_init__(self) -> None:
        check(bool(self.blocks), "the matrix has no block")
        check(self.tokens >= 0, f"tokens={self.tokens} must not be negative")
        check(self.time_limit_s > 0, f"time_limit_s={self.time_limit_s} must be positive")


def read_config(path: Path | None = None) -> Config:
    """The matrix of `path`, or of ci/matrix.json here. Raises ContractError naming what is wrong in it."""
    path = path or CONFIG
    check(path.is_file(), f"matrix file '{path}' does not exist; give one with --config, or run in the repository's root")
    try:
        content = jsonlib.loads(path.read_text(encoding="utf-8"))
        given = _only(content, ("matrix", "workflow"), "the file").get("matrix", {})
        options = _only(given, ("blocks", "candidates", "tokens", "time_limit_s"), "matrix")
        blocks = tuple(_block(block) for block in _list(options.get("blocks", [{}]), "blocks"))
        tokens, limit = options.get("tokens", Config.tokens), options.get("time_limit_s", Config.time_limit_s)
        check(isinstance(tokens, int), f"tokens is {tokens!r}, must be a whole number")
        check(isinstance(limit, (int, float)), f"time_limit_s is {limit!r}, must be a number")
        return Config(blocks, _names(options.get("candidates", []), "candidates"), tokens, limit)  # type: ignore[arg-type]
    except ContractError as error:
        raise ContractError(f"matrix file '{path}': {error}") from error
    except (ValueError, OSError) as error:
        raise ContractError(f"matrix file '{path}' cannot be read: {error}") from error


def _only(given: object, allowed: tuple[str, ...], where: str) -> Mapping[str, object]:
    check(isinstance(given, dict), f"{where} is {type(given).__name__}, must be an object")
    assert isinstance(given, dict)
    for key in given:
        known(f"key of {where}", key, allowed)
    return given


def _list(given: object, where: str) -> list[object]:
    check(isinstance(given, list), f"{where} is {type(given).__name__}, must be a list")
    assert isinstance(given, list)
    return given


def _names(given: object, where: str) -> tuple[str, ...]:
    """A list of names, or "all"."""
    if given == "all":
        return ()
    check(isinstance(given, list) and all(isinstance(n, str) for n in given), f'{where} must be a list of names, or "all"')
    assert isinstance(given, list)
    return tuple(given)


def _block(given: object) -> Block:
    allowed = ("presets", "dtypes", "layouts", "modes")
    return Block(**{key: _names(value, key) for key, value in _only(given, allowed, "a block").items()})


def cells(config: Config, candidates: Sequence[Candidate]) -> list[Cell]:
    """Every cell once, in the order of the blocks."""
    names = [c.name for c in candidates]
    for name in config.candidates:
        known("candidate of the matrix", name, names)
    found = (
        Cell(candidate, model, dtype, layout, mode)
        for block in config.blocks
        for model in block.presets or PRESETS
        for dtype in block.dtypes
        for layout in block.layouts
        for mode in block.modes
        for candidate in config.candidates or names
    )
    return list(dict.fromkeys(found))


def run(
    wanted: Sequence[Cell],
    candidates: Sequence[Candidate],
    mode: str,
    *,
    tokens: int = 8,
    time_limit_s: float = float("inf"),
    full_size: bool = False,
    jobs: int = 1,
) -> list[CellResult]:
    """A result for every cell, in their order. `mode` is what this process settled on: interpret or device.

    Cells whose layers are equal run once. With `jobs` other than 1 the candidates must be installed ones, which worker
    processes can find by their names.
    """
    known("mode", mode, MODES)
    by_name = {c.name: c for c in candidates}
    results: dict[Cell, CellResult] = {}
    waiting: dict[tuple[str, Case], list[Cell]] = {}
    for cell in wanted:
        case = cell.case(tokens, full_size)
        settled = _without_running(cell, by_name[cell.candidate], case, mode, full_size)
        if settled:
            results[cell] = settled
        else:
            waiting.setdefault((cell.candidate, case), []).append(cell)
    deadline = time.monotonic() + time_limit_s
    for verdict in _verdicts(list(waiting), by_name, mode, jobs, deadline):
        for cell in waiting.pop((verdict.candidate, verdict.case), []):
            results[cell] = _result(cell, verdict)
    late = f"the time limit of {time_limit_s:g} s was reached"
    for left in waiting.values():
        results |= {cell: CellResult(cell, State.NOT_RUN, late) for cell in left}
    return [results[cell] for cell in wanted]


def _without_running(cell: Cell, candidate: Candidate, case: Case, mode: str, full_size: bool) -> CellResult | None:
    if cell.mode != mode:
        missing = cell.mode == "device" and modes.cannot_run("torch", "cuda")
        reason = missing or f"this run's mode is {mode}: {cell.mode} is {MODES[cell.mode]}"
        return CellResult(cell, State.NOT_RUN, reason)
    device = "cuda" if mode == "device" else "cpu"
    if full_size and device == "cpu":
        return CellResult(cell, State.NOT_RUN, "layers of full size need an NVIDIA GPU")
    if obstacle := modes.cannot_run(candidate.backend, device):
        return CellResult(cell, State.NOT_RUN, obstacle)
    unsupported = candidate.supports(case.problem)
    return CellResult(cell, State.UNSUPPORTED, unsupported) if unsupported else None


def _verdicts(
    work: list[tuple[str, Case]], by_name: dict[str, Candidate], mode: str, jobs: int, deadline: float
) -> Iterator[Verdict]:
    """Case by case, so that the candidates of a case share its oracle; no case is begun past the deadline."""
    by_case: dict[Case, list[str]] = {}
    for name, case in work:
        by_case.setdefault(case, []).append(name)
    if jobs == 1:
        for case, names in by_case.items():
            for name in names:
                if time.monotonic() > deadline:
                    return
                yield judge(by_name[name], case)
        return
    stream = workers.run(list(by_name), [("", case) for case in by_case], mode, jobs)
    for verdict in stream:
        yield verdict
        if time.monotonic() > deadline:
            return


def _result(cell: Cell, verdict: Verdict) -> CellResult:
    """PASS is a PASS; ERROR, FLAKY, TIMEOUT and VACUOUS prove nothing, so they are no better than FAIL here."""
    if verdict.outcome is Outcome.PASS:
        return CellResult(cell, State.PASS, verdict=verdict)
    if verdict.outcome is Outcome.UNSUPPORTED:
        return CellResult(cell, State.UNSUPPORTED, verdict.reason, verdict)
    why = verdict.reason or str(verdict.findings[0])
    return CellResult(cell, State.FAIL, why if verdict.outcome is Outcome.FAIL else f"{verdict.outcome}: {why}", verdict)


# what is printed


def count(results: Iterable[CellResult]) -> dict[State, int]:
    tally = Counter(r.state for r in results)
    return {state: tally[state] for state in State}


def exit_code(results: Sequence[CellResult]) -> int:
    """0 all that ran passed, 1 a cell failed, 3 nothing ran."""
    counts = count(results)
    if counts[State.FAIL]:
        return 1
    return 0 if counts[State.PASS] else 3


def render(results: Sequence[CellResult]) -> Table:
    """A row for each preset, a column for each candidate; a field tells the states of its cells."""
    names = list(dict.fromkeys(r.cell.candidate for r in results))
    fields: dict[str, dict[str, list[CellResult]]] = {}
    for r in results:
        fields.setdefault(r.cell.preset, {}).setdefault(r.cell.candidate, []).append(r)
    legend = "cells: dtypes x layouts x modes; u unsupported, n not run"
    table = Table("preset", *names, title="moeproof matrix", caption=legend)
    for model, by_name in fields.items():
        table.add_row(model, *(_field(by_name.get(name, [])) for name in names))
    return table


def _field(results: list[CellResult]) -> str:
    """E.g. `3 PASS 3u 6n`: unsupported and not run only as numbers, FAIL with the dtypes and layouts it befell."""
    counts = count(results)
    parts = []
    if counts[State.PASS]:
        parts.append(f"[green]{counts[State.PASS]} PASS[/green]")
    failed = [f"{r.cell.dtype} {r.cell.layout}" for r in results if r.state is State.FAIL]
    if failed:
        parts.append(f"[bold red]{len(failed)} FAIL[/bold red] ({', '.join(dict.fromkeys(failed))})")
    for state, letter in ((State.UNSUPPORTED, "u"), (State.NOT_RUN, "n")):
        if counts[state]:
            parts.append(f"[dim]{counts[state]}{letter}[/dim]")
    return " ".join(parts)


def reasons(results: Iterable[CellResult]) -> list[str]:
    """Each reason once, with the number of its cells; failures with their replay lines first."""
    lines = [f"{r.cell}: {r.verdict}" for r in results if r.state is State.FAIL]
    tally = Counter((r.state, r.cell.candidate, r.reason) for r in results if r.state in (State.UNSUPPORTED, State.NOT_RUN))
    return [*lines, *(f"{n} {state} {name}: {reason}" for (state, name, reason), n in tally.items())]


def as_dict(result: CellResult) -> dict[str, object]:
    """One cell as a flat record."""
    record: dict[str, object] = {**vars(result.cell), "state": result.state.value, "reason": result.reason}
    return record | (report.as_dict(result.verdict) if result.verdict else {}) | {"reason": result.reason}


def summary(results: Sequence[CellResult], seconds: float) -> dict[str, object]:
    """The last line of --json."""
    counts = {state.name.lower(): n for state, n in count(results).items()}
    verdicts = {id(r.verdict): r.verdict for r in results if r.verdict}.values()
    checked = sum(v.checked for v in verdicts)
    worst = max((v.worst_ratio for v in verdicts), default=0.0)
    return {"cells": len(results), "checked": checked, **counts, "seconds": round(seconds, 3), "worst_ratio": worst}


def main(config: Path | None, mode: str, json: bool, full_size: bool = False, jobs: int = 0) -> int:
    """`moeproof matrix`: run every cell of the file and return the exit code."""
    start, settings, candidates = time.monotonic(), read_config(config), find_candidates()
    wanted = cells(settings, candidates)
    results = run(
        wanted,
        candidates,
        mode,
        tokens=settings.tokens,
        time_limit_s=settings.time_limit_s,
        full_size=full_size,
        jobs=jobs,
    )
    out = report.console(json)
    out.print(render(results))
    for line in reasons(results):
        out.print(escape(line), style="red" if line.startswith(State.FAIL.value) else "dim")
    if json:
        for result in results:
            report.print_json(as_dict(result))
        report.print_json(summary(results, time.monotonic() - start))
    else:
        tally = ", ".join(f"{n} {state}" for state, n in count(results).items() if n)
        out.print(f"{len(results)} cells: {tally}; {time.monotonic() - start:.0f} s", markup=False)
    return exit_code(results)
