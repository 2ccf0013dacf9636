"""The `moeproof` command. Exit codes: 0 all pass, 1 a verdict failed, 2 wrong usage, 3 nothing was checked."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moeproof._version import __version__
from moeproof.reference.contract.errors import ContractError, check

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Proves Mixture-of-Experts kernels right, stage by stage, against a float64 oracle with derived error bounds.",
)
golden_app = typer.Typer(no_args_is_help=True, help="Golden dumps: per-stage tensors of the oracle, for regression.")
app.add_typer(golden_app, name="golden")

Names = Annotated[
    list[str] | None,
    typer.Argument(help="Candidates: installed names, module:attribute or file.py:attribute; by default all installed."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON lines on standard output; tables go to standard error.")]
Mode = Annotated[str, typer.Option(help="auto, interpret (Triton on the CPU) or device (compiled, on the GPU).")]
Ranks = Annotated[int, typer.Option(help="Verify candidates for several ranks, on this many; 0 = as the case line says.")]
Transport = Annotated[str, typer.Option(help="Between ranks: auto, simulated, gloo, symm or nccl.")]
Deadline = Annotated[float, typer.Option(help="Seconds for one case on all ranks; after them the verdict is TIMEOUT.")]
Jobs = Annotated[int, typer.Option(help="Worker processes; 0 = one per core (1 on a GPU).")]


@app.command()
def verify(
    candidates: Names = None,
    model: Annotated[list[str] | None, typer.Option(help="Model presets; by default all.")] = None,
    case: Annotated[list[str] | None, typer.Option(help="Case lines instead of presets.")] = None,
    tier: Annotated[str, typer.Option(help="quick, default, full or soak: that tier's cases instead of presets.")] = "",
    random: Annotated[int, typer.Option(help="This many random cases instead of presets.")] = 0,
    tokens: Annotated[int, typer.Option(help="Tokens per case.")] = 4,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    full_size: Annotated[
        bool, typer.Option("--full-size", help="True dimensions instead of scaled twins (a GPU's work).")
    ] = False,
    mode: Mode = "auto",
    jobs: Jobs = 0,
    ranks: Ranks = 0,
    transport: Transport = "auto",
    deadline: Deadline = 60.0,
    json: Json = False,
) -> None:
    """Verify the installed candidates (or the named ones) over the presets of real models."""
    from moeproof.harness import workers
    from moeproof.harness.ranks import command as on_ranks
    from moeproof.harness.reports import report

    work = workers.plan(model or [], case or [], tier, random, tokens, dtype, full_size, ranks)
    if on_ranks.wanted(ranks, work):
        given = candidates or []
        raise typer.Exit(on_ranks.main(given, work, ranks, transport, mode, deadline, json, strict=bool(case)))
    mode = workers.settle(mode)
    names = workers.resolve(candidates or [])
    verdicts = report.progress(workers.run(names, work, mode, jobs), len(names) * len(work), json)
    raise typer.Exit(report.verify(verdicts, work, json))


@app.command()
def replay(
    case: Annotated[str, typer.Argument(help="A case line, in quotes.")],
    candidate: Annotated[list[str] | None, typer.Option(help="Candidates; by default all installed.")] = None,
    mode: Mode = "auto",
    transport: Transport = "auto",
    deadline: Deadline = 60.0,
    json: Json = False,
) -> None:
    """Run one case again and show every finding."""
    from moeproof.harness import workers
    from moeproof.harness.ranks import command as on_ranks
    from moeproof.harness.reports import report

    work = workers.plan([], [case], "", 0, 4, "bf16", False)
    if on_ranks.wanted(0, work):
        raise typer.Exit(on_ranks.main(candidate or [], work, 0, transport, mode, deadline, json, strict=True, replay=True))
    mode = workers.settle(mode)
    names = workers.resolve(candidate or [])
    verdicts = list(workers.run(names, work, mode, 1))
    raise typer.Exit(report.replay(verdicts, json))


@app.command()
def shrink(
    case: Annotated[str, typer.Argument(help="A case line that fails, in quotes.")],
    candidate: Annotated[str, typer.Option(help="The candidate that fails on it.")],
    seconds: Annotated[float, typer.Option(help="Time limit.")] = 60.0,
    runs: Annotated[int, typer.Option(help="Limit on runs.")] = 400,
    mode: Mode = "auto",
    transport: Transport = "auto",
    json: Json = False,
) -> None:
    """Find the simplest case that fails in the same way; crashes and hangs too, and on several ranks."""
    from moeproof.harness.shrinking import report as shrink_report

    raise typer.Exit(shrink_report.main(case, candidate, seconds, runs, mode, transport, json))


@app.command()
def matrix(
    mode: Mode = "auto",
    config: Annotated[Path | None, typer.Option(help="The matrix as data; by default ci/matrix.json here.")] = None,
    json: Json = False,
) -> None:
    """Run the CI matrix: candidates x presets x dtypes x layouts x modes; every cell ends in a verdict or a reason."""
    from moeproof.harness import workers
    from moeproof.harness.reports import matrix as cells

    mode = workers.settle(mode)
    raise typer.Exit(cells.main(config, mode, json))


Models = Annotated[list[str] | None, typer.Option("--model", help="Models whose work points are run; by default all.")]
Tokens = Annotated[list[int] | None, typer.Option("--tokens", help="Tokens of a call; by default each model's own list.")]
Routings = Annotated[list[str] | None, typer.Option("--routing", help="uniform or zipf; by default both.")]


@app.command()
def bench(
    candidates: Names = None,
    model: Models = None,
    tokens: Tokens = None,
    routing: Routings = None,
    kind: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp8b, fp8c or mxfp4; several are run in turn.")] = None,
    layout: Annotated[
        str, typer.Option(help="standard, or batched: for pairs; regions of T * K rows, partly filled.")
    ] = "standard",
    dtype: Annotated[str, typer.Option(help="With --ranks: bf16 or fp16.")] = "bf16",
    peers: Annotated[Path | None, typer.Option(help="CSV of stored times that readings are held against.")] = None,
    seconds: Annotated[float, typer.Option(help="Time of one candidate's replays at one point, about.")] = 0.15,
    stages: Annotated[bool, typer.Option("--stages", help="Also the device time of each kernel, from the profiler.")] = False,
    output: Annotated[Path | None, typer.Option(help="File for all readings, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of time and fraction of roof over M; needs matplotlib.")] = None,
    mode: Mode = "auto",
    ranks: Annotated[int, typer.Option(help="Time dispatch and combine of candidates for several ranks, on this many.")] = 0,
    transport: Transport = "auto",
    hidden: Annotated[int, typer.Option(help="With --ranks: hidden size.")] = 7168,
    topk: Annotated[int, typer.Option(help="With --ranks: experts of a token.")] = 8,
    experts: Annotated[int, typer.Option(help="With --ranks: experts of all ranks together.")] = 64,
    deadline: Deadline = 60.0,
    json: Json = False,
) -> None:
    """Time candidates at work points of real models; each is held against the oracle first."""
    if ranks:
        from moeproof.harness.ranks import bench as dispatch
        from moeproof.harness.ranks import bench_report as on_ranks

        on_ranks.refuse({"--model": model, "--routing": routing, "--peers": peers, "--stages": stages, "--plot": plot})
        sizes, options = dispatch.Sizes(hidden, topk, experts, dtype), dispatch.Options(seconds, deadline)
        raise typer.Exit(on_ranks.main(candidates or [], tokens or [], sizes, ranks, transport, options, json, output))
    from moeproof.harness import modes, workers
    from moeproof.harness.registry import load_candidates
    from moeproof.harness.timing import bench as timing
    from moeproof.harness.timing import points as bench_points
    from moeproof.harness.timing import report as bench_report

    workers.settle(mode)
    device = modes.default_device()
    chosen = load_candidates(workers.resolve(candidates or []))
    known = timing.read_peers(peers) if peers else {}
    small = device == "cpu"
    few = tuple(tokens or ([4] if small else []))
    works = []
    for one in kind or ["bf16"]:
        works += bench_points.grid(tuple(model or ()), few, tuple(routing or ()), one, small, layout)
    readings = timing.measure(chosen, works, device, timing.Options(seconds, stages))
    raise typer.Exit(bench_report.main(readings, known, device, json, output, plot))


@app.command()
def tune(
    candidate: Annotated[str, typer.Argument(help="The candidate whose configurations are searched.")],
    model: Models = None,
    tokens: Tokens = None,
    routing: Routings = None,
    kind: Annotated[str, typer.Option(help="bf16, fp16, fp8b, fp8c or mxfp4.")] = "bf16",
    output: Annotated[Path | None, typer.Option(help="The table; points that are already there are kept.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Every time and refusal, as JSON.")] = None,
    weak: Annotated[Path | None, typer.Option(help="Results of bench: only points slower there than the peers.")] = None,
    peers: Annotated[Path | None, typer.Option(help="CSV of stored times, for --weak.")] = None,
    below: Annotated[float, typer.Option(help="For --weak: best peer's time / own time is under this.")] = 1.0,
    seconds: Annotated[float, typer.Option(help="The whole search, about.")] = 240.0,
    mode: Mode = "auto",
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Search a candidate's configurations, each held against the oracle first, and write the table it chooses from."""
    from moeproof.harness import modes, workers
    from moeproof.harness.timing import bench, tune_table
    from moeproof.harness.timing import points as bench_points
    from moeproof.harness.timing import tune as tuning

    workers.settle(mode)
    device = modes.default_device()
    small = device == "cpu"
    few = tuple(tokens or ([4] if small else []))
    works = bench_points.grid(tuple(model or ()), few, tuple(routing or ()), kind, small)
    if weak:
        check(peers is not None, "--weak needs --peers: the times to hold its readings against")
        assert peers is not None
        works = tune_table.weak(works, weak, bench.read_peers(peers), candidate, below)
        check(bool(works), f"no point of '{weak}' is below {below}: nothing to tune")
    jobs = jobs or min(os.cpu_count() or 1, 14)
    found = tuning.tune(candidate, works, output, device, jobs, seconds, lambda line: typer.echo(line, err=True))
    raise typer.Exit(tuning.main(found, json, trace))


@app.command()
def policies(
    scheme: Annotated[str, typer.Option(help="One scheme; by default all.")] = "",
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32; by default all.")] = "",
    accumulate: Annotated[str, typer.Option(help="Accumulator that a candidate claims.")] = "fp32",
    decode: Annotated[str, typer.Option(help="How it claims to decode weights: exact or dtype.")] = "exact",
    json: Json = False,
) -> None:
    """Print how each stage is judged, per dtype and scheme: formula and reason."""
    from moeproof.harness.reports import policies as table

    raise typer.Exit(table.main(scheme, dtype, accumulate, decode, json))


@app.command()
def ratios(
    candidates: Names = None,
    scheme: Annotated[list[str] | None, typer.Option(help="Schemes; by default all quantised ones.")] = None,
    cases: Annotated[int, typer.Option(help="Random cases per scheme and layout; every fourth an exact probe.")] = 10,
    output: Annotated[Path | None, typer.Option(help="File for the table, as JSON.")] = None,
    mode: Mode = "auto",
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Measure observed/allowed errors of healthy candidates for every quantised scheme."""
    from moeproof.harness.reports import ratios as table

    raise typer.Exit(table.main(candidates or [], scheme or [], cases, output, mode, jobs, json))


@app.command()
def doctor(json: Json = False) -> None:
    """Say what this machine can run, and what is missing."""
    from moeproof.harness.reports import doctor as checks

    raise typer.Exit(checks.main(json))


@app.command()
def faults(
    classes: Annotated[list[str] | None, typer.Option("--class", help="P01 .. P100, or a name; by default all.")] = None,
    rules: Annotated[bool, typer.Option("--rules", help="Public suites' rules and recipes on the same faults.")] = False,
    gpu: Annotated[bool, typer.Option("--gpu", help="Only what a GPU alone can trigger: streams and captured graphs.")] = False,
    ask: Annotated[str, typer.Option(help="A check of yours, tests.py:check_moe: which of the faults it lets through.")] = "",
    output: Annotated[Path | None, typer.Option(help="Folder for faults.md and results/faults-cpu.json.")] = None,
    jobs: Jobs = 0,
    json: Json = False,
) -> None:
    """Plant the public fault classes one by one, and show what the harness makes of each."""
    from moeproof.harness.faults import ask_report, command, gpu_report

    if ask:
        check(not (rules or gpu or output), "--ask goes with --class and --json only: it writes nothing")
        raise typer.Exit(ask_report.main(ask, classes or [], json))
    if gpu:
        check(not classes and not rules, "--gpu goes with neither --class nor --rules: it hunts a list of its own")
        raise typer.Exit(gpu_report.main(output, json))
    raise typer.Exit(command.main(classes or [], rules, output, jobs, json))


@golden_app.command("record")
def golden_record(
    folder: Annotated[Path, typer.Argument(help="Folder for the dumps.")],
    case: Annotated[list[str] | None, typer.Option(help="Case lines; by default the canonical case of every preset.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Dumps that differ are overwritten.")] = False,
    json: Json = False,
) -> None:
    """Write per-stage tensors of the oracle for each case, atomically."""
    from moeproof.harness.cases.case import parse_case
    from moeproof.harness.dumps import golden

    cases = [parse_case(line) for line in case] if case else golden.canonical_cases()
    raise typer.Exit(golden.main_record(cases, folder, force, json))


@golden_app.command("check")
def golden_check(
    folder: Annotated[Path, typer.Argument(help="Folder of the dumps.")],
    candidate: Annotated[list[str] | None, typer.Option(help="Candidates held against the dumps too.")] = None,
    mode: Mode = "auto",
    json: Json = False,
) -> None:
    """Check the oracle (and candidates) against stored tensors. Damaged files are refused."""
    from moeproof.harness import workers
    from moeproof.harness.dumps import golden
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
