"""One call of a candidate under one poison pattern, and everything around the call checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from moeproof.harness.judging.expect import shapes
from moeproof.harness.judging.memory import Guarded, Poison, Spread, dirty, guard_inputs, overlap
from moeproof.harness.judging.quant_expect import code_dtypes
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import TENSORS

Tensor = torch.Tensor
NEEDS = {"topk_ids": ("topk_weights",), "topk_weights": ("topk_ids",), "sorted_slots": ("block_expert", "num_padded")}


@dataclass(frozen=True)
class Run:
    """What a call showed, what was wrong around it, and what it raised."""

    shown: Mapping[str, Tensor]
    findings: tuple[Finding, ...] = ()
    error: str = ""
    refused: bool = False
    """The candidate refused its arguments with a ContractError, before doing anything."""


def run_once(candidate: Candidate, inputs: Inputs, pattern: str, device: str | None = None) -> Run:
    """Call the candidate on guarded copies of the inputs, with every fresh buffer holding `pattern`.

    It runs on `device`, by default where the inputs are; what it shows comes back to where the inputs are.
    """
    given, guards = guard_inputs(inputs, pattern, device)
    dirty(given.device)
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
    findings += damage(given, shown if isinstance(shown, Mapping) else {}, guards, poison)
    if findings:
        return Run({}, tuple(findings))
    return Run({name: t.clone().to(inputs.device) for name, t in shown.items()})


def _raised(error: Exception) -> Run:
    fault = getattr(error, "as_finding", None)
    if fault is not None:
        return Run({}, (Finding(None, **fault()),))
    first = str(error).strip().split("\n")[0] or "no message"
    refused = isinstance(error, ContractError)
    kind = "refused its arguments" if refused else f"raised {type(error).__name__}"
    return Run({}, (), f"the candidate {kind}: {first}", refused)


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
    exact = code_dtypes(given) if given.problem.quant.quantised else {}
    if name in exact:
        return None if t.dtype == exact[name] else f"is {t.dtype}, must be {exact[name]}"
    allowed = {"out": (own,), "topk_weights": (torch.float32,), "rows": (own,)}.get(name, (own, torch.float32))
    names = " or ".join(str(d) for d in dict.fromkeys(allowed))
    return None if t.dtype in allowed else f"is {t.dtype}, must be {names}"


def damage(given: Inputs, shown: Mapping[str, Tensor], guards: list[Guarded | Spread], poison: Poison) -> list[Finding]:
    findings = []
    inplace = given.problem.inplace
    for guard in guards:
        if inplace and guard.name == "hidden_states":
            continue
        if words := guard.damage():
            findings.append(Finding(None, guard.name, words))
    findings += [Finding(None, "memory", words) for words in poison.damage()]
    findings += _aliases(given, shown)
    if inplace and "out" in shown and shown["out"].data_ptr() != given.hidden_states.data_ptr():
        findings.append(Finding(TENSORS["out"], "out", "must be hidden_states itself: the problem says inplace"))
    return findings


def _aliases(given: Inputs, shown: Mapping[str, Tensor]) -> list[Finding]:
    """`out` shares memory with no input and with nothing else that is shown, unless the problem says inplace."""
    out = shown.get("out")
    if given.problem.inplace or not isinstance(out, Tensor):
        return []
    others = [*given.tensors(), *((n, t) for n, t in shown.items() if n != "out" and isinstance(t, Tensor))]
    names = [name for name, t in others if overlap(out, t)]
    return [Finding(TENSORS["out"], "out", f"shares memory with {name}") for name in names]
