"""Golden dumps: each stage of the oracle on disk, so that neither the oracle nor a candidate can drift unseen."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from moeproof.harness import modes
from moeproof.harness.api import exit_code
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.cases.presets import PRESETS, preset, scaled
from moeproof.harness.dumps.golden_file import (
    MANIFEST,
    Entry,
    environment,
    file_hash,
    read_dump,
    read_manifest,
    tensor_hash,
    write_dump,
    write_manifest,
)
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.gate import blind_case
from moeproof.harness.judging.judge import run_once
from moeproof.harness.judging.route_check import check_ids, weights_at
from moeproof.harness.reports import report
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.errors import check as demand
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS, Stage
from moeproof.reference.oracle.chain import chain
from moeproof.reference.oracle.experts import live_slots
from moeproof.reference.oracle.router import Selection, route
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
Dump = Mapping[str, Tensor]
"""`gate_up.value` float64, `gate_up.bound` float64, .., `route.ids`: what one file holds."""

STAGED = ("gate_up", "h", "y", "out")
NEAR = 2.0**-40
"""float64 sums keep this much of a row's largest value on every CPU; their last bits depend on the BLAS (MKL_CBWR)."""
NEAR_BOUND = 2.0**-20
"""Allowed errors are differences of nearby values, so they keep fewer bits than the values do."""

TOKENS, WIDTH = 5, 20
_TINY = "T=5,H=24,I=18,E=8,K=2"
EXTRA = (
    f"{_TINY},values=int,seed=1",
    f"{_TINY},values=sat,seed=2",
    f"{_TINY},act=gelu,values=sat,routing=minus1,seed=3",
    f"{_TINY},act=silu_no_mul,values=sat,storage=KN,seed=4",
    f"{_TINY},dtype=fp16,values=hetero,routing=dup,seed=5",
    f"{_TINY},dtype=fp32,values=int,routing=zipf,seed=6",
    f"{_TINY},dtype=fp32,act=situ:beta=4,routing=hot,seed=7",
    f"{_TINY},layout=batched,routing=empty,seed=8",
    f"{_TINY},routing=none,seed=9",
    f"{_TINY},router=softmax:renorm=sum,logits=ties,strided=1,seed=10",
    f"{_TINY},router=sigmoid:fused_shared=1,ep=2,ep_rank=1,seed=11",
    f"{_TINY},act=swiglustep,values=hetero,seed=12",
    f"{_TINY},scale_on_sum=2.5,shared=12,dtype=fp32,seed=13",
    "T=0,H=8,I=8,E=4,K=2,seed=14",
)
"""What no preset's plain twin has: exact recipes, other dtypes, layouts, routings and activations."""


@dataclass(frozen=True)
class GoldenVerdict(Verdict):
    """A verdict against stored tensors. The candidate `oracle` is this installation's own oracle."""

    folder: str = ""

    @property
    def replay(self) -> str:
        chosen = "" if self.candidate == ORACLE else f" --candidate {shlex.quote(self.source or self.candidate)}"
        return f"moeproof golden check {self.folder}{chosen}"


ORACLE = "oracle"


def twin(model: str) -> Case:
    """The canonical case of a preset: its layer with 5 tokens and widths of at most 20."""
    return Case(scaled(preset(model), T=TOKENS, width=WIDTH))


def canonical_cases() -> list[Case]:
    """One tiny case for each preset (equal ones once), and the EXTRA ones."""
    return list(dict.fromkeys([*map(twin, PRESETS), *map(parse_case, EXTRA)]))


# what a file holds


def dump(inputs: Inputs) -> dict[str, Tensor]:
    """ROUTE's selection and the chain's values and bounds, under the candidate's default claims."""
    selection = route(inputs)
    tensors = {f"route.{f.name}": getattr(selection, f.name) for f in fields(Selection)}
    for name, value in chain(inputs, Claims()).items():
        assert value.bound is not None
        tensors |= {f"{name}.value": value.value, f"{name}.bound": value.bound}
    return {name: t.contiguous() for name, t in tensors.items()}


def file_name(case: Case) -> str:
    """Readable, and unique by the hash of the case line."""
    p = case.problem
    tag = hashlib.sha256(str(case).encode()).hexdigest()[:8]
    return f"{p.router.score}-{p.act.name}-E{p.E}K{p.K}-{p.dtype}-{tag}.safetensors"


# writing


def record(cases: Sequence[Case], folder: Path, force: bool = False) -> list[Path]:
    """Write a file for each case and the manifest; files that hold the same tensors are left alone.

    The same means what `check` grants: other CPUs give other last bits of float64, and they rewrite nothing.
    Raises ContractError, before anything is written, where a file would change and `force` is not given. Entries of other
    cases stay. Each file appears whole or not at all; the manifest comes last.
    """
    demand(bool(cases), "golden record needs at least one case")
    demand(not folder.exists() or folder.is_dir(), f"'{folder}' is not a folder")
    entries = read_manifest(folder) if (folder / MANIFEST).exists() else {}
    fresh: dict[str, tuple[Entry, dict[str, Tensor]]] = {}
    clashes: list[str] = []
    for case in dict.fromkeys(cases):
        name, inputs = file_name(case), make_inputs(case)
        tensors = dump(inputs)
        hashes = {k: tensor_hash(t) for k, t in tensors.items()}
        entry = Entry(str(case), 0, "", digest(inputs), hashes, environment())
        clash = _clash(folder / name, entries.get(name), entry, tensors, _exact_everywhere(case))
        same = name in entries and entries[name].tensors == hashes
        if not clash and (folder / name).exists() and (same or not force):
            continue
        if clash:
            clashes.append(f"golden file '{folder / name}' {clash}")
        fresh[name] = (entry, tensors)
    more = f" (and {len(clashes) - 1} more)" if len(clashes) > 1 else ""
    demand(force or not clashes, f"{clashes[0] if clashes else ''}{more}; nothing was written, --force overwrites")
    folder.mkdir(parents=True, exist_ok=True)
    for name, (entry, tensors) in fresh.items():
        entries[name] = write_dump(folder / name, entry, tensors)
    if fresh:
        write_manifest(folder, entries)
    return [folder / file_name(case) for case in dict.fromkeys(cases)]


def _clash(path: Path, old: Entry | None, new: Entry, tensors: Dump, exact: tuple[str, ...]) -> str:
    """What would be lost by writing `new` there; empty where nothing would."""
    if old is None:
        return "exists but is not in the manifest" if path.exists() else ""
    if old.inputs != new.inputs:
        return "holds other inputs for the same case line"
    changed = [n for n in new.tensors if old.tensors.get(n) != new.tensors[n]]
    if set(old.tensors) != set(new.tensors):
        return "holds other tensors"
    if path.exists() and file_hash(path) != old.sha256:
        return "is not the file that the manifest describes"
    if changed and path.exists():
        then = read_dump(path, old)
        changed = [n for n in changed if _agree(n, tensors[n], then[n], n.partition(".")[0] in exact)[0]]
    return f"holds other values of {', '.join(changed)}" if changed else ""


# checking


def check_folder(folder: Path, candidates: Sequence[Candidate] = ()) -> Iterator[GoldenVerdict]:
    """Verdicts of the oracle, then of each candidate, file by file. All files are read before the first verdict."""
    entries = read_manifest(folder)
    demand(bool(entries), f"golden manifest '{folder / MANIFEST}' lists no file")
    stray = sorted(p.name for p in folder.glob("*.safetensors") if p.name not in entries)
    demand(not stray, f"golden file '{folder / (stray or [''])[0]}' is foreign: {MANIFEST} does not list it")
    stored = {name: read_dump(folder / name, entry) for name, entry in entries.items()}
    for name, entry in entries.items():
        case = parse_case(entry.case)
        inputs = make_inputs(case)
        verdict = _check_oracle(case, inputs, entry, stored[name], folder, name)
        yield verdict
        if not any(f.tensor == "inputs" for f in verdict.findings):
            for candidate in candidates:
                yield _check_candidate(candidate, case, stored[name], folder)


def check(folder: Path, candidates: Sequence[Candidate] | None = None) -> list[GoldenVerdict]:
    """The oracle (and candidates) against the stored tensors of a folder.

    Raises ContractError where a file is damaged, truncated, missing, foreign or newer; a difference is a verdict.
    """
    return list(check_folder(folder, candidates or ()))


def _exact_everywhere(case: Case) -> tuple[str, ...]:
    """Tensors whose float64 sums have no rounding in any order, so that every CPU must give the same bits."""
    p = case.problem
    if case.values not in ("int", "sat") or case.routing == "router" or p.latent:
        return ()
    if case.values == "int":
        return ("gate_up",)
    return ("gate_up", "h", "y") if p.shared_gate or p.scale_on_sum != 1.0 else STAGED


def _check_oracle(case: Case, inputs: Inputs, entry: Entry, stored: Dump, folder: Path, name: str) -> GoldenVerdict:
    start = time.perf_counter()
    found = digest(inputs)
    findings: list[Finding] = []
    near: list[str] = []
    worst: dict[str, float] = {}
    checked = 1
    if found != entry.inputs:
        words = f"regenerated with SHA-256 {found[:12]}.., recorded {entry.inputs[:12]}..: a recipe or the generator changed"
        findings.append(Finding(None, "inputs", words))
    else:
        for key, now in dump(inputs).items():
            then = stored.get(key)
            fits = then is not None and then.shape == now.shape and then.dtype == now.dtype
            demand(fits, f"golden file '{folder / name}' is foreign: tensor {key} is missing or has another shape or dtype")
            assert then is not None
            checked += now.numel()
            finding, ratio = _agree(key, now, then, key.partition(".")[0] in _exact_everywhere(case))
            if finding:
                findings.append(finding)
            elif ratio is not None:
                near.append(key)
                worst[key] = ratio
    reason = f"within 2^-40, not bitwise: {', '.join(near)}" if near and not findings else ""
    return GoldenVerdict(
        Outcome.FAIL if findings else Outcome.PASS,
        ORACLE,
        case,
        tuple(findings),
        reason,
        checked,
        worst,
        seconds=time.perf_counter() - start,
        environment=", ".join(f"{k} {v}" for k, v in environment().items()),
        folder=str(folder),
    )


def _agree(key: str, now: Tensor, then: Tensor, exact: bool) -> tuple[Finding | None, float | None]:
    """(None, None) where the bits agree; (None, observed/allowed) where another CPU may differ so; else what is wrong."""
    if torch.equal(now.contiguous().view(torch.uint8), then.contiguous().view(torch.uint8)):
        return None, None
    name, _, part = key.partition(".")
    a, b = now.double(), then.double()
    allowed = torch.zeros_like(b)
    if now.is_floating_point() and not exact:
        if part in ("bound", "error", "margin"):
            allowed = b.abs() * NEAR_BOUND
        else:
            row = torch.where(b.isfinite(), b.abs(), 0.0).amax(dim=-1, keepdim=True) if b.numel() else b
            allowed = (row * NEAR).expand_as(b)
    same = (a == b) | (a.isnan() & b.isnan())
    ok = same | ((a - b).abs() <= allowed)
    if bool(ok.all()):
        ratio = torch.where(same, 0.0, (a - b).abs() / allowed)
        return None, float(ratio.nan_to_num(nan=0.0).max()) if ratio.numel() else 0.0
    where = [int(i) for i in (~ok).nonzero()[0]]
    at = tuple(where)
    return (
        Finding(
            stage=TENSORS.get(name, Stage.ROUTE),
            tensor=key,
            message="the oracle no longer gives the recorded value",
            token=where[0],
            slot=where[1] if len(where) == 3 else None,
            column=where[-1] if len(where) > 1 else None,
            got=float(a[at]),
            want=float(b[at]),
            allowed=float(allowed[at]),
            bad=int((~ok).sum()),
            total=ok.numel(),
        ),
        None,
    )


def _check_candidate(candidate: Candidate, case: Case, stored: Dump, folder: Path) -> GoldenVerdict:
    device = modes.default_device()
    start = time.perf_counter()

    def verdict(outcome: Outcome, **rest: object) -> GoldenVerdict:
        return GoldenVerdict(
            outcome,
            candidate.name,
            case,
            claims=str(candidate.claims),
            seconds=time.perf_counter() - start,
            environment=modes.environment(candidate.backend, device),
            folder=str(folder),
            source=candidate.source,
            **rest,  # type: ignore[arg-type]
        )

    if reason := modes.cannot_run(candidate.backend, device) or candidate.supports(case.problem):
        return verdict(Outcome.UNSUPPORTED, reason=reason)
    inputs = make_inputs(case, device)
    run = run_once(candidate, inputs, "nan")
    if run.error:
        return verdict(Outcome.ERROR, reason=run.error)
    if run.findings:
        return verdict(Outcome.FAIL, findings=run.findings, checked=1)
    here = {name: t.to(device) for name, t in stored.items()}
    wants = _wants(inputs, here, candidate.claims)
    results: dict[str, Comparison] = {}
    if "topk_ids" in run.shown:
        results["topk_ids"] = _check_route(run.shown["topk_ids"], run.shown["topk_weights"], here, inputs, candidate.claims)
    for name in STAGED:
        if name in run.shown:
            experts = inputs.topk_ids if run.shown[name].dim() == 3 else None
            results[name] = compare(name, run.shown[name], wants[name], experts)
    findings = tuple(f for r in results.values() for f in r.findings)
    checked = 2 * len(results) + sum(r.checked for r in results.values())
    worst = {name: r.ratio for name, r in results.items()}
    if findings:
        return verdict(Outcome.FAIL, findings=findings, checked=checked, worst=worst)
    if not results:
        return verdict(Outcome.VACUOUS, reason=f"shows none of topk_ids, {', '.join(STAGED)}")
    # Each tensor is held against the chain from the inputs, whatever else is shown: so the gate looks at each alone.
    shown = [(name, run.shown[name].dtype) for name in results if name in wants]
    blind = list(dict.fromkeys(why for one in shown for why in blind_case(case, candidate.claims, (one,), device)))
    if blind:
        return verdict(Outcome.VACUOUS, reason="; ".join(blind), checked=checked, worst=worst)
    return verdict(Outcome.PASS, checked=checked, worst=worst)


def _wants(inputs: Inputs, stored: Dump, claims: Claims) -> dict[str, Value]:
    """The stored values with their bounds, widened where the candidate claims weaker arithmetic than the default."""
    default, live, fmt = Claims(), live_slots(inputs), inputs.problem.fmt
    weaker = any(getattr(claims, k) != getattr(default, k) for k in ("accumulate", "combine", "activation"))
    own = chain(inputs, claims) if weaker else {}
    wants = {}
    for name in STAGED:
        value, bound = stored[f"{name}.value"], stored[f"{name}.bound"]
        if weaker:
            allowed = own[name].bound
            assert allowed is not None
            bound = torch.maximum(bound, allowed + (own[name].value - value).abs())
        wants[name] = Value(value, bound, None if name == "out" else live, fmt)
    return wants


def _check_route(ids: Tensor, weights: Tensor, stored: Dump, inputs: Inputs, claims: Claims) -> Comparison:
    """route_check.check_route, with the stored selection in the place of a new one."""
    want = Selection(**{f.name: stored[f"route.{f.name}"] for f in fields(Selection)})
    findings, rows = check_ids(ids, want, inputs, claims)
    if not claims.total_router:
        rows = rows & want.defined
    known = rows & (ids.long().sort(1).values == want.ids.sort(1).values).all(1)
    value = weights_at(ids, want, inputs)
    result = compare("topk_weights", weights, Value(value.value, value.bound, known, value.fmt))
    return Comparison((*findings, *result.findings), ids.numel() + result.checked, result.ratio)


# the command


def main_record(cases: Sequence[Case], folder: Path, force: bool, json: bool) -> int:
    """`moeproof golden record`: print the file of each case and return the exit code."""
    for path in record(cases, folder, force=force):
        if json:
            report.print_json({"file": path.name})
        else:
            report.console(json).print(path, markup=False, soft_wrap=True)
    if json:
        report.print_json({"cases": len(set(cases))})
    return 0


def main_check(folder: Path, candidates: Sequence[Candidate], json: bool) -> int:
    """`moeproof golden check`: print what came of it and return the exit code."""
    verdicts = []
    for verdict in check_folder(folder, candidates):
        verdicts.append(verdict)
        if json:
            report.print_json(report.as_dict(verdict))
    out = report.console(json)
    for name in dict.fromkeys(v.candidate for v in verdicts):
        mine = [v for v in verdicts if v.candidate == name]
        tally = {o: sum(v.outcome is o for v in mine) for o in Outcome}
        near = sum(bool(v.reason) for v in mine if v.outcome is Outcome.PASS)
        how = (f" ({near} within 2^-40, the others bitwise)" if near else " (bitwise)") if name == ORACLE else ""
        out.print(f"{name}: {', '.join(f'{n} {o}' for o, n in tally.items() if n)}{how}", markup=False)
    for verdict in verdicts:
        if verdict.outcome not in (Outcome.PASS, Outcome.UNSUPPORTED):
            out.print(str(verdict), markup=False, style="red")
    if json:
        report.print_json(report.summary(verdicts))
    return exit_code(verdicts)
