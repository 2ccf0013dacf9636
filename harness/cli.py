"""The `moeproof` command. Exit codes: 0 all pass, 1 a verdict failed, 2 wrong usage, 3 nothing was checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from moeproof._version import __version__
from moeproof.reference.contract.errors import ContractError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Proves Mixture-of-Experts kernels right, stage by stage, against a float64 oracle with derived error bounds.",
)
golden_app = typer.Typer(no_args_is_help=True, help="Golden dumps: per-stage tensors of the oracle, for regression.")
app.add_typer(golden_app, name="golden")

Names = Annotated[list[str] | None, typer.Argument(help="Candidates: installed names, module:attribute, or file.py:attribute.")]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output; tables go to standard error.")]
Mode = Annotated[str, typer.Option(help="auto, interpret (Triton on the CPU) or device (compiled, on the GPU).")]
Jobs = Annotated[int, typer.Option(help="Worker processes; 0 = one per core (1 on a GPU).")]


@app.command()
def verify(
    candidates: Names = None,
    model: Annotated[Optional[list[str]], typer.Option(help="Model presets; by default all of them.")] = None,  # noqa: UP045
    case: Annotated[Optional[list[str]], typer.Option(help="Case lines instead of presets.")] = None,  # noqa: UP045
    tier: Annotated[str, typer.Option(help="quick, full or soak: that tier's cases instead of presets.")] = "",
    random: Annotated[int, typer.Option(help="This many random cases instead of presets.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens per case.")] = 4,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    full_size: Annotated[
        bool, typer.Option("--full-size", help="True dimensions instead of scaled twins (a GPU's work).")
    ] = False,
    mode: Mode = "auto",
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Verify the installed candidates (or the named ones) over the presets of real models."""
    from moeproof.harness import report, workers

    mode = workers.settle(mode)
    work = workers.plan(model or [], case or [], tier, random, tokens, dtype, full_size)
    names = workers.resolve(candidates or [])
    verdicts = report.progress(workers.run(names, work, mode, jobs), len(names) * len(work), json)
    raise typer.Exit(report.verify(verdicts, work, json))


@app.command()
def replay(
    case: Annotated[str, typer.Argument(help="A case line, in quotes.")],
    candidate: Annotated[Optional[list[str]], typer.Option(help="Candidates to run; by default all installed.")] = None,  # noqa: UP045
    mode: Mode = "auto",
    json: Json = False,
) -> None:
    """Run one case again and show every finding."""
    from moeproof.harness import report, workers

    mode = workers.settle(mode)
    work = workers.plan([], [case], "", 0, 4, "bf16", False)
    names = workers.resolve(candidate or [])
    verdicts = list(workers.run(names, work, mode, 1))
    raise typer.Exit(report.replay(verdicts, json))


@app.command()
def matrix(
    mode: Mode = "auto",
    config: Annotated[Optional[Path], typer.Option(help="The matrix as data; by default ci/matrix.json here.")] = None,  # noqa: UP045
    json: Json = False,
) -> None:
    """Run the CI matrix: candidates x presets x dtypes x layouts x modes; every cell ends in a verdict or a reason."""
    from moeproof.harness import matrix as cells
    from moeproof.harness import workers

    mode = workers.settle(mode)
    raise typer.Exit(cells.main(config, mode, json))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine can run, and what is missing."""
    from moeproof.harness import doctor as checks

    raise typer.Exit(checks.main(json))


@app.command()
def faults(
    classes: Annotated[Optional[list[str]], typer.Option("--class", help="P01 .. P100, or a name; by default all.")] = None,  # noqa: UP045
    rules: Annotated[bool, typer.Option("--rules", help="Public suites' rules and recipes on the same faults.")] = False,
    out: Annotated[Optional[Path], typer.Option(help="Folder for faults.md and results/faults-cpu.json.")] = None,  # noqa: UP045
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Plant the public fault classes one by one, and show what the harness makes of each."""
    from moeproof.harness.faults import command

    raise typer.Exit(command.main(classes or [], rules, out, jobs, json))


@golden_app.command("record")
def golden_record(
    folder: Annotated[Path, typer.Argument(help="Where the dumps go.")],
    case: Annotated[list[str] | None, typer.Option(help="Case lines; by default the canonical case of every preset.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite dumps that differ.")] = False,
) -> None:
    """Write per-stage tensors of the oracle for each case, atomically."""
    from moeproof.harness import golden
    from moeproof.harness.case import parse_case

    cases = [parse_case(line) for line in case] if case else golden.canonical_cases()
    for path in golden.record(cases, folder, force=force):
        typer.echo(path)


@golden_app.command("check")
def golden_check(
    folder: Annotated[Path, typer.Argument(help="Where the dumps are.")],
    candidate: Annotated[Optional[list[str]], typer.Option(help="Candidates to hold against the dumps too.")] = None,  # noqa: UP045
    mode: Mode = "auto",
    json: Json = False,
) -> None:
    """Check the oracle (and candidates) against stored tensors. Damaged files are refused."""
    from moeproof.harness import golden, workers
    from moeproof.harness.registry import load_candidates

    workers.settle(mode)
    raise typer.Exit(golden.main_check(folder, load_candidates(candidate or []), json))


def _version(show: bool) -> None:
    if show:
        typer.echo(f"moeproof {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: one clear message instead of a traceback for everything a user can mend."""
    # One thread per process: more only get in each other's way at these sizes.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("MKL_NUM_THREADS", "1")
    try:
        app()
    except ContractError as error:
        typer.echo(f"moeproof: {error}", err=True)
        sys.exit(2)
    except KeyboardInterrupt:
        typer.echo("moeproof: interrupted", err=True)
        sys.exit(130)
