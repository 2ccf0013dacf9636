"""case -> inputs -> candidate -> findings -> verdict."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from moeproof.harness import modes
from moeproof.harness.case import Case
from moeproof.harness.compare import vacuous
from moeproof.harness.expect import Expectation, judge_shown, shapes
from moeproof.harness.inputs import make_inputs
from moeproof.harness.memory import PATTERNS, Guarded, Poison, guard_inputs
from moeproof.harness.pairs import as_candidate
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract.candidate import Candidate, Claims
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.experts import live_slots

Tensor = torch.Tensor
NEEDS = {"topk_ids": ("topk_weights",), "topk_weights": ("topk_ids",), "sorted_slots": ("block_expert", "num_padded")}


@dataclass(frozen=True)
class Run:
    """One call of the candidate, and what happened around it."""

    shown: Mapping[str, Tensor]
    findings: tuple[Finding, ...]
    error: str = ""


@functools.lru_cache(maxsize=1)
def _inputs(case: Case, device: str) -> Inputs:
    """One oracle and one set of inputs serve all candidates of a session."""
    return make_inputs(case, device)


@functools.lru_cache(maxsize=2)
def _expectation(case: Case, device: str, claims: Claims) -> Expectation:
    return Expectation(_inputs(case, device), claims)


def judge(thing: object, case: Case, device: str | None = None) -> Verdict:
    """Run a candidate (a Candidate, a Pair, or a callable) on a case and say what came of it.

    Nothing that the candidate does raises from here: what it throws, returns or damages becomes part of the verdict.
    """
    candidate = as_candidate(thing)
    device = device or modes.default_device()
    start = time.perf_counter()

    def verdict(outcome: Outcome, **rest: object) -> Verdict:
        seconds = time.perf_counter() - start
        environment = modes.environment(candidate.backend, device)
        return Verdict(
            outcome,
            candidate.name,
            case,
            claims=str(candidate.claims),
            seconds=seconds,
            environment=environment,
            **rest,  # type: ignore[arg-type]
        )

    reason = modes.cannot_run(candidate.backend, device) or candidate.supports(case.problem)
    if reason:
        return verdict(Outcome.UNSUPPORTED, reason=reason)
    inputs = _inputs(case, device)
    runs = []
    for pattern in PATTERNS:
        run = run_once(candidate, inputs, pattern)
        if run.error:
            return verdict(Outcome.ERROR, reason=run.error)
        if run.findings:
            return verdict(Outcome.FAIL, findings=run.findings, checked=1)
        runs.append(run)
    return _decide(candidate, case, device, inputs, runs, verdict)


def _decide(
    candidate: Candidate, case: Case, device: str, inputs: Inputs, runs: list[Run], verdict: Callable[..., Verdict]
) -> Verdict:
    shown = runs[0].shown
    expect = _expectation(case, device, candidate.claims)
    results, values = judge_shown(shown, expect)
    # Facts: one shape and one dtype for each tensor, and every element.
    checked = 2 * len(shown) + sum(r.checked for r in results.values())
    worst = {name: r.ratio for name, r in results.items()}
    findings = [f for r in results.values() for f in r.findings]
    make = functools.partial(verdict, checked=checked, worst=worst)
    if findings:
        return make(Outcome.FAIL, findings=tuple(findings))
    if candidate.claims.deterministic == "none":
        for run in runs[1:]:
            more, _ = judge_shown(run.shown, expect)
            findings += [f for r in more.values() for f in r.findings]
        if findings:
            return make(Outcome.FAIL, findings=tuple(findings))
    elif changed := _differences(runs, inputs):
        again = run_once(candidate, inputs, PATTERNS[0])
        if again.error or _differences([runs[0], again], inputs):
            words = "two runs on the same inputs differ, and the candidate claims the same bits from run to run"
            return make(Outcome.FLAKY, findings=tuple(Finding(TENSORS[n], n, words) for n in changed))
        words = f"the result depends on what unwritten memory held ({' against '.join(PATTERNS)})"
        # Where one of the patterns gives a wrong result, that is the better story: it has a stage and coordinates.
        for pattern, run in zip(PATTERNS[1:], runs[1:], strict=True):
            worse, _ = judge_shown(run.shown, expect)
            told = [
                replace(f, message=f"{f.message} where unwritten memory holds '{pattern}'")
                for r in worse.values()
                for f in r.findings
            ]
            if told:
                return make(Outcome.FAIL, findings=tuple(told))
        return make(Outcome.FAIL, findings=tuple(Finding(TENSORS[n], n, words) for n in changed))
    reasons = [why for name, value in values.items() if (why := vacuous(name, value))]
    if reasons:
        return make(Outcome.VACUOUS, reason="; ".join(reasons))
    return make(Outcome.PASS)


def run_once(candidate: Candidate, inputs: Inputs, pattern: str) -> Run:
    """One call under one poison pattern, with everything around it checked."""
    given, guards = guard_inputs(inputs, pattern)
    # Guard bands catch overruns of buffers; torch's own fill of empty tensors would hide the pattern.
    poison = Poison(pattern)
    try:
        with poison:
            returned = candidate.run(given)
        if given.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever a candidate throws becomes its verdict
        return _raised(error)
    shown = {"out": returned} if isinstance(returned, Tensor) else returned
    findings = _contract(candidate, shown, given)
    findings += _damage(given, shown, guards, poison)
    if findings:
        return Run({}, tuple(findings))
    return Run({name: t.clone() for name, t in shown.items()}, ())


def _raised(error: Exception) -> Run:
    fault = getattr(error, "as_finding", None)
    if fault is not None:
        return Run({}, (Finding(None, **fault()),))
    first = str(error).strip().split("\n")[0] or "no message"
    kind = "refused its arguments" if isinstance(error, ContractError) else f"raised {type(error).__name__}"
    return Run({}, (), f"the candidate {kind}: {first}")


def _contract(candidate: Candidate, shown: object, given: Inputs) -> list[Finding]:
    """Names, types, shapes, dtypes and devices of what came back."""
    if not isinstance(shown, Mapping) or not shown:
        return [Finding(None, "out", f"returned {type(shown).__name__}, must be a tensor or a mapping of canonical tensors")]
    findings = []
    allowed = shapes(given.problem, given)
    for name, t in shown.items():
        if name not in allowed:
            findings.append(Finding(None, str(name), f"is no canonical tensor; allowed: {', '.join(allowed)}"))
        elif not isinstance(t, Tensor):
            findings.append(Finding(TENSORS[name], name, f"is a {type(t).__name__}, must be a tensor"))
        elif (shape := allowed[name]) is not None and tuple(t.shape) != shape:
            findings.append(Finding(TENSORS[name], name, f"has shape {tuple(t.shape)}, must be {shape}"))
        elif t.device != given.device:
            findings.append(Finding(TENSORS[name], name, f"is on {t.device}, must be on {given.device}"))
        elif words := _wrong_dtype(name, t, given):
            findings.append(Finding(TENSORS[name], name, words))
        missing = [n for n in NEEDS.get(name, ()) if n not in shown]
        if missing:
            findings.append(Finding(TENSORS[name], name, f"can only be judged together with {', '.join(missing)}"))
    promised = [n for n in candidate.shows if n not in shown and n == "out"]
    if promised:
        findings.append(Finding(TENSORS["out"], "out", "was promised but not returned"))
    return findings


def _wrong_dtype(name: str, t: Tensor, given: Inputs) -> str | None:
    own = given.problem.fmt.dtype
    if name in ("topk_ids", "expert_num_tokens", "sorted_slots", "block_expert", "num_padded"):
        integer = not t.dtype.is_floating_point and not t.dtype.is_complex and t.dtype != torch.bool
        return None if integer else f"is {t.dtype}, must be an integer dtype"
    allowed = {"out": (own,), "topk_weights": (torch.float32,), "rows": (own,)}.get(name, (own, torch.float32))
    names = " or ".join(str(d) for d in dict.fromkeys(allowed))
    return None if t.dtype in allowed else f"is {t.dtype}, must be {names}"


def _damage(given: Inputs, shown: Mapping[str, Tensor], guards: list[Guarded], poison: Poison) -> list[Finding]:
    findings = []
    inplace = given.problem.inplace
    for guard in guards:
        if inplace and guard.name == "hidden_states":
            continue
        if words := guard.damage():
            findings.append(Finding(None, guard.name, words))
    findings += [Finding(None, "memory", words) for words in poison.damage()]
    if inplace and "out" in shown and shown["out"].data_ptr() != given.hidden_states.data_ptr():
        findings.append(Finding(TENSORS["out"], "out", "must be hidden_states itself: the problem says inplace"))
    return findings


def _differences(runs: list[Run], inputs: Inputs) -> list[str]:
    """Names of tensors whose comparable elements differ between the runs, bit for bit."""
    first = runs[0].shown
    changed = []
    for name, a in first.items():
        for run in runs[1:]:
            b = run.shown.get(name)
            if b is None or not _same_bits(name, a, b, inputs):
                changed.append(name)
                break
    return changed


def _same_bits(name: str, a: Tensor, b: Tensor, inputs: Inputs) -> bool:
    """Rows that do not exist (dead slots, padding) may hold anything."""
    if name in ("rows", "sorted_slots", "block_expert"):
        return True  # only parts of these exist; they are judged as invariants
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if name in ("gate_up", "h", "y"):
        live = live_slots(inputs)
        a, b = a[live], b[live]
    # As integers of the same size: a byte view would need a last stride of 1, which a single column may lack.
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(torch.equal(a.view(bits), b.view(bits)))
