"""Tables for people, JSON lines for programs."""

from __future__ import annotations

import json as jsonlib
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from moeproof.harness.api import count, exit_code
from moeproof.harness.cases.case import Case
from moeproof.harness.verdict import Finding, Outcome, Verdict

STYLE = {
    Outcome.PASS: "green",
    Outcome.UNSUPPORTED: "dim",
    Outcome.VACUOUS: "yellow",
    Outcome.FLAKY: "magenta",
}


def console(json: bool) -> Console:
    """Standard error when standard output carries JSON."""
    return Console(stderr=json, highlight=False)


def progress(verdicts: Iterator[Verdict], total: int, json: bool) -> list[Verdict]:
    """Collect verdicts behind a progress bar; with `json`, print each as it comes."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    collected = []
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verifying", total=total)
        for verdict in verdicts:
            collected.append(verdict)
            if json:
                print_json(as_dict(verdict))
            bar.advance(task)
    return collected


def print_json(record: dict[str, object]) -> None:
    sys.stdout.write(jsonlib.dumps(record) + "\n")
    sys.stdout.flush()


def as_dict(v: Verdict) -> dict[str, object]:
    """One verdict as a flat record."""
    return {
        "outcome": v.outcome.value,
        "candidate": v.candidate,
        "case": str(v.case),
        "reason": v.reason,
        "checked": v.checked,
        "worst_ratio": _finite(v.worst_ratio),
        "worst": {k: _finite(x) for k, x in v.worst.items()},
        "claims": v.claims,
        "seconds": round(v.seconds, 4),
        "environment": v.environment,
        **({"rank": v.rank, "transport": v.transport, "rank_seeds": v.rank_seeds} if v.transport else {}),
        "findings": [_finding(f) for f in v.findings],
        "replay": v.replay,
    }


def _finding(f: Finding) -> dict[str, object]:
    record = {k: v for k, v in vars(f).items() if v not in (None, "", 0)}
    for key in ("got", "want", "allowed"):
        if getattr(f, key) is not None:
            record[key] = _finite(getattr(f, key))
    return record | {"stage": f.stage.value if f.stage else None, "text": str(f)}


def _finite(x: float) -> float | str:
    """JSON has no NaN and no infinity."""
    return x if x - x == 0 else str(x)


def summary(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """The last line of --json: counts by outcome and the totals."""
    counts = {k.lower(): n for k, n in count(verdicts).items()}
    return {
        "cases": len({str(v.case) for v in verdicts}),
        "checked": sum(v.checked for v in verdicts),
        **counts,
        "not_run": 0,
        "seconds": round(sum(v.seconds for v in verdicts), 3),
        "worst_ratio": _finite(max((v.worst_ratio for v in verdicts), default=0.0)),
    }


def verify(verdicts: Sequence[Verdict], work: Sequence[tuple[str, Case]], json: bool) -> int:
    """Print the table and the failures; return the exit code."""
    out = console(json)
    labels = {str(case): label or str(case) for label, case in work}
    names = list(dict.fromkeys(v.candidate for v in verdicts))
    table = Table(title=f"moeproof verify, {time.strftime('%Y-%m-%d %H:%M')}", caption=_caption(verdicts))
    models = any(label for label, _ in work)
    table.add_column("model" if models else "case", overflow="fold", no_wrap=models)
    for name in names:
        table.add_column(name, justify="center")
    rows: dict[str, dict[str, list[Verdict]]] = {}
    for label in dict.fromkeys(labels.values()):
        rows[label] = {}
    for v in verdicts:
        rows[labels[str(v.case)]].setdefault(v.candidate, []).append(v)
    for label, by_name in rows.items():
        table.add_row(label, *(_cell(by_name.get(name, [])) for name in names))
    out.print(table)
    _reasons(out, verdicts)
    _failures(out, verdicts)
    if json:
        print_json(summary(verdicts))
    else:
        out.print(_line(verdicts), markup=False)
    return exit_code(verdicts)


def replay(verdicts: Sequence[Verdict], json: bool) -> int:
    out = console(json)
    for v in verdicts:
        if json:
            print_json(as_dict(v))
        out.print(str(v), markup=False, soft_wrap=True, style=STYLE.get(v.outcome, "red"))
        if v.worst:
            shares = ", ".join(f"{name} {ratio:.3g}" for name, ratio in v.worst.items())
            out.print(f"  {v.checked} facts checked; observed/allowed: {shares}; claims: {v.claims}", markup=False)
    if json:
        print_json(summary(verdicts))
    return exit_code(verdicts)


def _cell(verdicts: list[Verdict]) -> str:
    """The worst verdict of a row's cases; unsupported ones count only where nothing else ran."""
    ran = [v for v in verdicts if v.outcome is not Outcome.UNSUPPORTED]
    if not ran:
        return "[dim]-[/dim]"
    worst = next((v for v in ran if v.outcome is not Outcome.PASS), None)
    if worst is not None:
        return f"[{STYLE.get(worst.outcome, 'bold red')}]{worst.outcome}[/]"
    return f"[green]PASS[/green] {max(v.worst_ratio for v in ran):.2f}"


def _caption(verdicts: Sequence[Verdict]) -> str:
    environments = sorted({v.environment for v in verdicts if v.environment})
    return "PASS with the largest observed/allowed error; - not supported\n" + "\n".join(environments)


def _reasons(out: Console, verdicts: Sequence[Verdict]) -> None:
    """Why candidates ran nothing of a model, each reason once."""
    seen = dict.fromkeys((v.candidate, v.reason) for v in verdicts if v.outcome is Outcome.UNSUPPORTED)
    for name, reason in seen:
        if "layout" not in reason:
            out.print(f"  - {name}: {reason}", markup=False, style="dim")


def _failures(out: Console, verdicts: Sequence[Verdict]) -> None:
    for v in verdicts:
        if v.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED):
            out.print(str(v), markup=False, soft_wrap=True, style=STYLE.get(v.outcome, "red"))


def _line(verdicts: Sequence[Verdict]) -> str:
    counts = ", ".join(f"{n} {name}" for name, n in count(verdicts).items() if n) or "nothing ran"
    return f"{counts}; {sum(v.checked for v in verdicts):,} facts checked"
