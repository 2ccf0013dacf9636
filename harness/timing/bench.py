"""`moeproof bench`: how fast a candidate is, at work points of real models, against the roof and against stored peers.

Every candidate is held against the oracle at every point before it is timed, and what its timed graph replays left behind
must have the bits of that checked call. A candidate that fails has no time.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from moeproof.harness import modes
from moeproof.harness.judging.memory import Poison
from moeproof.harness.judging.pairs import untapped
from moeproof.harness.timing import timer as bench_timer
from moeproof.harness.timing.inputs import Answer, answer, make_sets
from moeproof.harness.timing.points import Least, Work, least
from moeproof.harness.timing.timer import Ceilings, Graph, Timing
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
CPU_ROOF = Ceilings(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class Reading:
    """One candidate at one point. Without a time where `reason` says why."""

    candidate: str
    model: str
    M: int
    routing: str
    kind: str
    """The number formats: a dtype, or a scheme."""
    us: float = math.nan
    us_min: float = math.nan
    us_max: float = math.nan
    replays: int = 0
    roof_us: float = math.nan
    fraction_of_roof: float = math.nan
    active_experts: float = math.nan
    """Mean over the sets of inputs: with few tokens the time is theirs, and other routings name other numbers of them."""
    tflops: float = math.nan
    gbs: float = math.nan
    eager_us: float = math.nan
    launch_us: float = math.nan
    """Host time of an eager call until it returns."""
    worst_ratio: float = math.nan
    """Largest observed/allowed error of the checked call."""
    checked: int = 0
    kernels: Mapping[str, float] = field(default_factory=dict)
    """Device microseconds by kernel name, from the profiler."""
    reason: str = ""

    def record(self) -> dict[str, object]:
        """For JSON: rounded, and without what is not known."""
        clean = {k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(self).items()}
        return {k: v for k, v in clean.items() if v not in ("", {}) and v == v}


@dataclass(frozen=True)
class Options:
    seconds: float = 0.15
    """Replays of one candidate at one point, about."""
    stages: bool = False
    """Also ask the profiler for the time of each kernel."""


def input_sets(M: int) -> int:
    """How many sets of inputs take turns: more where a call is short, so that nothing stays in L2."""
    return 8 if M <= 256 else 4 if M <= 1024 else 2


def out_of(shown: Tensor | Mapping[str, Tensor]) -> Tensor:
    return shown if isinstance(shown, Tensor) else shown["out"]


def measure(candidates: Sequence[Candidate], works: Sequence[Work], device: str, options: Options) -> Iterator[Reading]:
    """Point by point, all candidates of a point in turn on the same inputs: a pair in one run."""
    roofs = bench_timer.ceilings() if device == "cuda" else CPU_ROOF
    for work in works:
        sets = make_sets(work, input_sets(work.M) if device == "cuda" else 2, device)
        floor = least(sets)
        answers: dict[Claims, Answer] = {}
        for candidate in candidates:
            reason = modes.cannot_run(candidate.backend, device) or candidate.supports(work.problem)
            if reason:
                yield Reading(candidate.name, work.model, work.M, work.routing, work.named_kind, reason=reason)
                continue
            # What is claimed of the router and of repetition changes no bound of `out`.
            numeric = replace(candidate.claims, ties="any", total_router=False, deterministic="run")
            if numeric not in answers:
                answers[numeric] = answer(sets[0], numeric)
            yield _one(candidate, work, sets, floor, answers[numeric], roofs, device, options)
            if device == "cuda":
                torch.cuda.empty_cache()


def _one(
    candidate: Candidate,
    work: Work,
    sets: list[Inputs],
    floor: Least,
    want: Answer,
    roofs: Ceilings,
    device: str,
    options: Options,
) -> Reading:
    head = (candidate.name, work.model, work.M, work.routing, work.named_kind)
    run = untapped(candidate)
    calls = [lambda inputs=inputs: out_of(run(inputs)) for inputs in sets]
    try:
        with Poison("nan"):
            first = calls[0]()
        found = want.check(first)
        if found.findings:
            return Reading(*head, reason=f"wrong: {found.findings[0]}")
        if device != "cuda":
            time = bench_timer.on_cpu(calls)
            return _reading(head, time, floor, roofs, found.ratio, found.checked)
        graph = Graph(calls)
        time = graph.time(options.seconds)
        if candidate.claims.deterministic != "none" and not torch.equal(graph.outputs[0], first):
            return Reading(*head, reason="wrong: the replayed graph left other bits than the checked call")
        launch, wall = bench_timer.eager(calls)
        stages = bench_timer.kernels(calls[-1]) if options.stages else {}
    except Exception as error:  # a candidate that cannot run here has no time, and the others still do
        return Reading(*head, reason=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:300])
    return _reading(head, time, floor, roofs, found.ratio, found.checked, wall, launch, stages)


def _reading(
    head: tuple[str, str, int, str, str],
    time: Timing,
    floor: Least,
    roofs: Ceilings,
    ratio: float,
    checked: int,
    wall: float = math.nan,
    launch: float = math.nan,
    stages: Mapping[str, float] | None = None,
) -> Reading:
    # Products of two fp8 operands run at twice the rate.
    roof = floor.roof_us(roofs.fp8_tflops if head[-1].startswith("fp8") else roofs.tflops, roofs.gbs)
    return Reading(
        *head,
        us=time.us,
        us_min=time.us_min,
        us_max=time.us_max,
        replays=time.replays,
        roof_us=roof,
        fraction_of_roof=roof / time.us,
        active_experts=floor.active,
        tflops=floor.flops / (time.us * 1e6),
        gbs=floor.nbytes / (time.us * 1e3),
        eager_us=wall,
        launch_us=launch,
        worst_ratio=ratio,
        checked=checked,
        kernels=stages or {},
    )


Peers = dict[tuple[str, str, str, int], dict[str, float]]
"""(kind, model, routing, M) -> peer -> microseconds. The fastest of a point is also there as `best`."""


def read_peers(path: Path) -> Peers:
    """A CSV with columns kind, shape, routing, M, best_peer, best_peer_us, and second_peer, second_us where there is one."""
    check(path.is_file(), f"peers file '{path}' does not exist")
    peers: Peers = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            missing = {"kind", "shape", "routing", "M", "best_peer", "best_peer_us"} - set(row)
            check(not missing, f"peers file '{path}' lacks the columns {', '.join(sorted(missing))}")
            found = {"best": float(row["best_peer_us"]), row["best_peer"]: float(row["best_peer_us"])}
            if row.get("second_us"):
                found[row["second_peer"]] = float(row["second_us"])
            peers[row["kind"], row["shape"], row["routing"], int(row["M"])] = found
    return peers


def geomean_vs(readings: Sequence[Reading], peers: Peers) -> dict[str, dict[str, float]]:
    """Candidate -> peer -> geometric mean of peer's time / candidate's time, over the points that both have."""
    logs: dict[str, dict[str, list[float]]] = {}
    for r in readings:
        for peer, us in peers.get((r.kind, r.model, r.routing, r.M), {}).items():
            if r.us == r.us:
                logs.setdefault(r.candidate, {}).setdefault(peer, []).append(math.log(us / r.us))
    return {c: {p: round(math.exp(sum(x) / len(x)), 4) for p, x in found.items()} for c, found in logs.items()}


def geomean_between(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    """The same among the candidates of this run: live peers."""
    live: Peers = {}
    for r in readings:
        if r.us == r.us:
            live.setdefault((r.kind, r.model, r.routing, r.M), {})[r.candidate] = r.us
    table = geomean_vs(readings, live)
    return {c: {p: x for p, x in found.items() if p != c} for c, found in table.items()}
