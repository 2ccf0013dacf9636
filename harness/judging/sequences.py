"""Several calls of one instance: what it keeps from call to call must not show.

A sequence runs related cases one after the other and the first one again; after each call its arguments are destroyed, so
that whoever kept an address reads garbage. A replay captures one call and repeats it with other contents in the same
memory, as a captured graph is replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.judging.memory import Poison, guard_inputs
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.verdict import Finding, Outcome, Verdict
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.oracle.experts import live_slots

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
Capture = Callable[[Inputs], Callable[[], Shown]]
"""static inputs -> a function that repeats the captured call on whatever those tensors hold by then."""
OTHER_ACTIVATION = {True: ("silu", "gelu", "swigluoai"), False: ("silu_no_mul", "relu2_no_mul", "gelu_no_mul")}


def neighbours(case: Case) -> list[Case]:
    """Cases of the same shapes that differ in what a call may wrongly remember: contents, routing, activation, tokens."""
    p = case.problem
    following = [replace(case, seed=case.seed + 1)]
    other = next(name for name in OTHER_ACTIVATION[p.act.gated] if name != p.act.name)
    changes: tuple[dict[str, object], ...] = ({"routing": "minus1"}, {"routing": "uniform"})
    following += _possible(lambda change: replace(case, seed=case.seed + 2, **change), changes)
    following += _possible(lambda act: case.with_problem(act=act), (Activation(other),))
    following += _possible(lambda T: case.with_problem(T=T), (max(p.T // 2, 1), p.T + 1))
    return [c for c in following if c != case]


def _possible(make: Callable[..., Case], changes: Sequence[object]) -> list[Case]:
    """Those of the changes that give a legal case."""
    made = []
    for change in changes:
        try:
            made.append(make(change))
        except ContractError:
            continue  # e.g. more slots than experts
    return made


def judge_sequence(thing: object, case: Case, device: str | None = None) -> Verdict:
    """The case, its neighbours, and the case again, on one instance; every call is judged."""
    candidate = as_candidate(thing)
    device = device or modes.default_device()
    start = time.perf_counter()
    reason = modes.cannot_run(candidate.backend, device) or candidate.supports(case.problem)
    if reason:
        return _verdict(candidate, case, device, start, Outcome.UNSUPPORTED, reason=reason)
    checked, first = 0, None
    calls = [c for c in (case, *neighbours(case), case) if candidate.supports(c.problem) is None]
    for number, one in enumerate(calls):
        shown, findings, error, facts = _one_call(candidate, make_inputs(one, device))
        checked += facts
        if error:
            return _verdict(candidate, one, device, start, Outcome.ERROR, reason=f"call {number + 1} of a sequence: {error}")
        if not findings and one == case:
            if first is None:
                first = shown
            elif candidate.claims.deterministic != "none":
                findings = _changed(first, shown, make_inputs(case, device))
        if findings:
            named = tuple(replace(f, message=f"{f.message} (call {number + 1} of a sequence)") for f in findings)
            return _verdict(candidate, one, device, start, Outcome.FAIL, findings=named, checked=checked)
    return _verdict(candidate, case, device, start, Outcome.PASS, checked=checked)


def _one_call(candidate: Candidate, inputs: Inputs, judged: bool = True) -> tuple[Shown, list[Finding], str, int]:
    """(what was shown, findings, error, facts checked); the arguments are destroyed before this returns."""
    given, _ = guard_inputs(inputs, "nan")
    try:
        with Poison("nan"):
            returned = candidate.run(given)
    except Exception as error:  # whatever a candidate throws becomes its verdict
        return {}, [], f"raised {type(error).__name__}: {error}", 0
    shown = {"out": returned} if isinstance(returned, Tensor) else returned
    shown = {name: t.clone() for name, t in shown.items()}
    destroy(given)
    return (shown, *_findings(shown, inputs, candidate)) if judged else (shown, [], "", 0)


def destroy(inputs: Inputs) -> None:
    """What a freed argument may hold by the time somebody reads it."""
    for _, t in inputs.tensors():
        t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max)


def judge_repeats(thing: object, case: Case, repeats: int, device: str | None = None) -> tuple[Verdict, int]:
    """The same call over and over, until its bits change: (verdict, calls made). For races, which no single call shows.

    A call that differs is judged: FAIL where it is wrong, FLAKY where it is only another of the right answers.
    """
    candidate = as_candidate(thing)
    device = device or modes.default_device()
    start = time.perf_counter()
    if reason := modes.cannot_run(candidate.backend, device) or candidate.supports(case.problem):
        return _verdict(candidate, case, device, start, Outcome.UNSUPPORTED, reason=reason), 0
    inputs, first, checked = make_inputs(case, device), None, 0
    for number in range(1, repeats + 1):
        shown, findings, error, facts = _one_call(candidate, inputs, judged=first is None)
        checked += facts
        if error:
            return _verdict(candidate, case, device, start, Outcome.ERROR, reason=f"call {number}: {error}"), number
        if not findings and first is not None and (changed := _changed(first, shown, inputs)):
            findings, _, facts = _findings(shown, inputs, candidate)
            checked += facts
            if not findings:
                return _verdict(candidate, case, device, start, Outcome.FLAKY, findings=tuple(changed)), number
        if findings:
            named = tuple(replace(f, message=f"{f.message} (call {number})") for f in findings)
            return _verdict(candidate, case, device, start, Outcome.FAIL, findings=named, checked=checked), number
        first = first or shown
    return _verdict(candidate, case, device, start, Outcome.PASS, checked=checked), repeats


def judge_replay(
    name: str, capture: Capture, case: Case, candidate: Candidate, device: str | None = None, replays: int = 12
) -> Verdict:
    """Capture the case, then replay it with the contents of other seeds and routings in the same tensors.

    `candidate` says what the captured thing supports and claims. A dozen replays: flags of a protocol that alternate
    between two or more slots are reused only after some rounds.
    """
    device = device or modes.default_device()
    start = time.perf_counter()
    if reason := candidate.supports(case.problem):
        return _verdict(candidate, case, device, start, Outcome.UNSUPPORTED, reason=reason)
    static = make_inputs(case, device)
    others = [replace(case, seed=case.seed + number) for number in range(1, replays)]
    others += _possible(lambda routing: replace(case, routing=routing), ("minus1", "hot", "none"))
    checked = 0
    try:
        again = capture(static)
        for number, one in enumerate([case, *others]):
            fresh = make_inputs(one, device)
            for (_, t), (_, new) in zip(static.tensors(), fresh.tensors(), strict=True):
                t.copy_(new)
            shown = {tensor: t.clone() for tensor, t in again().items()}
            findings, error, facts = _findings(shown, fresh, candidate)
            checked += facts
            if findings:
                named = tuple(replace(f, message=f"{f.message} (replay {number + 1} of {name})") for f in findings)
                return _verdict(candidate, one, device, start, Outcome.FAIL, findings=named, checked=checked)
    except Exception as error:  # whatever a candidate throws becomes its verdict
        return _verdict(candidate, case, device, start, Outcome.ERROR, reason=f"raised {type(error).__name__}: {error}")
    return _verdict(candidate, case, device, start, Outcome.PASS, checked=checked)


def _findings(shown: Shown, inputs: Inputs, candidate: Candidate) -> tuple[list[Finding], str, int]:
    results, _ = judge_shown(shown, Expectation(inputs, candidate.claims))
    return [f for r in results.values() for f in r.findings], "", sum(r.checked for r in results.values())


def _changed(first: Shown, last: Shown, inputs: Inputs) -> list[Finding]:
    """Tensors of live rows whose bits differ between the first and the last call."""
    found = []
    for name, a in first.items():
        b = last[name]
        if name in ("rows", "sorted_slots", "block_expert"):
            continue  # only parts of these exist; they are judged as invariants
        if name in ("gate_up", "h", "y"):
            live = live_slots(inputs)
            a, b = a[live], b[live]
        if a.shape != b.shape or not torch.equal(a, b):
            found.append(Finding(TENSORS[name], name, "another result than at the first call of the same case"))
    return found


def _verdict(candidate: Candidate, case: Case, device: str, start: float, outcome: Outcome, **rest: object) -> Verdict:
    return Verdict(
        outcome,
        candidate.name,
        case,
        claims=str(candidate.claims),
        seconds=time.perf_counter() - start,
        environment=modes.environment(candidate.backend, device),
        **rest,  # type: ignore[arg-type]
    )
