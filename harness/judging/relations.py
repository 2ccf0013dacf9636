"""Metamorphic relations: what must follow for the output when the inputs are changed in a known way. No oracle needed.

They see whatever couples a token to its batch, a slot to its position or an expert to its number. Bitwise where the
candidate claims `deterministic=batch` (weights times two: always, since scaling by two commutes with rounding), else within
twice the bound, because two results within one bound may be that far apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.tokens import tokens_at
from moeproof.harness.judging.compare import compare
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.judging.trial import Ruling, Trial, failed
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor


@dataclass(frozen=True)
class Relation:
    """`changed` are the calls to make; `expected` turns the plain output into what they must return, one after another."""

    changed: Callable[[Inputs, Stream], tuple[Inputs, ...]]
    expected: Callable[[Tensor, Inputs, Stream], tuple[Tensor, ...]]
    bitwise: Callable[[Trial], bool]


def _batch_invariant(trial: Trial) -> bool:
    return trial.candidate.claims.deterministic == "batch"


def _scales_exactly(trial: Trial) -> bool:
    """One order of summing, and no product of weight and y rounded to where numbers are subnormal."""
    claims = trial.candidate.claims
    return claims.deterministic != "none" and claims.combine == "fp32"


def _never(trial: Trial) -> bool:
    return False


def _order(inputs: Inputs, s: Stream) -> Tensor:
    return s.shuffled(inputs.problem.T)


def _twice(inputs: Inputs) -> Tensor:
    return torch.arange(inputs.problem.T, device=inputs.device).repeat(2)


def _halves(inputs: Inputs) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(inputs.problem.T, device=inputs.device)
    middle = (inputs.problem.T + 1) // 2
    return tokens[:middle], tokens[middle:]


def _relabelled(inputs: Inputs, s: Stream) -> Inputs:
    """Expert e becomes expert number[e]; identity experts and slots that are not routed stay."""
    p = inputs.problem
    number = s.shuffled(p.weight_experts)
    ids = inputs.topk_ids.long()
    owned = (ids >= 0) & (ids < p.weight_experts)
    ids = torch.where(owned, number[ids.clamp(0, p.weight_experts - 1)], ids)
    owner = torch.argsort(number)
    moved = {n: _like(t, t[owner]) for n, t in _expert_tensors(inputs)}
    return inputs.map({"topk_ids": ids.to(inputs.topk_ids.dtype), **moved})


def _expert_tensors(inputs: Inputs) -> list[tuple[str, Tensor]]:
    """What has a row for each expert: weights with their scales, zero points and biases, and global scales of h."""
    owned = [(n, t) for n, t in inputs.tensors() if n.startswith(("w1", "w2", "b1", "b2"))]
    a2 = inputs.problem.quant.a2
    if a2 is not None and a2.two_level and inputs.a2_scale is not None:
        owned.append(("a2_scale", inputs.a2_scale))
    return owned


def _like(template: Tensor, values: Tensor) -> Tensor:
    """The values in the template's strides."""
    return torch.empty_strided(template.shape, template.stride(), dtype=template.dtype, device=template.device).copy_(values)


def _flipped(inputs: Inputs) -> Inputs:
    return inputs.map({"topk_ids": inputs.topk_ids.flip(1), "topk_weights": inputs.topk_weights.flip(1)})


def _doubled(inputs: Inputs) -> Inputs:
    return inputs.map({"topk_weights": inputs.topk_weights * 2})


RELATIONS: dict[str, Relation] = {
    "permute": Relation(
        lambda i, s: (tokens_at(i, _order(i, s)),),
        lambda out, i, s: (out[_order(i, s)],),
        _batch_invariant,
    ),
    "duplicate": Relation(
        lambda i, s: (tokens_at(i, _twice(i)),),
        lambda out, i, s: (out[_twice(i)],),
        _batch_invariant,
    ),
    "split": Relation(
        lambda i, s: tuple(tokens_at(i, half) for half in _halves(i)),
        lambda out, i, s: tuple(out[half] for half in _halves(i)),
        _batch_invariant,
    ),
    "relabel": Relation(lambda i, s: (_relabelled(i, s),), lambda out, i, s: (out,), _never),
    "flip": Relation(lambda i, s: (_flipped(i),), lambda out, i, s: (out,), _never),
    "double": Relation(lambda i, s: (_doubled(i),), lambda out, i, s: (out * 2,), _scales_exactly),
}


def related(trial: Trial) -> Ruling | None:
    """Run the case's relation on a candidate that shows `out`."""
    name, inputs = trial.case.relation, trial.inputs
    if "out" not in trial.shown:
        return None
    relation = RELATIONS[name]

    def stream() -> Stream:
        """The same draws for the inputs and for what follows."""
        return Stream(trial.case.seed, f"relation/{name}", inputs.device)

    bound = trial.expect.chained("out").bound
    assert bound is not None
    wants = relation.expected(trial.shown["out"].double(), inputs, stream())
    bounds = relation.expected(2 * bound, inputs, stream())
    for changed, want, allowed in zip(relation.changed(inputs, stream()), wants, bounds, strict=True):
        if reason := trial.candidate.supports(changed.problem):
            return Ruling(Outcome.UNSUPPORTED, reason=f"relation={name} needs another problem: {reason}")
        run = trial.again(changed, PATTERNS[0])
        if ruling := failed(run):
            return ruling
        fmt = changed.problem.fmt
        exact = relation.bitwise(trial)
        if exact:
            allowed = scaling_error(want, fmt) if name == "double" else torch.zeros_like(want)
        value = Value(want, allowed, None, fmt)
        result = compare("out", run.shown["out"], value)
        trial.tally.add(result.checked)
        if result.findings:
            return Ruling(Outcome.FAIL, tuple(_named(f, name, exact) for f in result.findings))
    return None


def scaling_error(doubled: Tensor, fmt: Format) -> Tensor:
    """Scaling by two is exact for normal numbers. Below them twice the rounding of y is up to 3/2 steps off that of 2 y."""
    least = 2.0**fmt.emin
    return torch.where(doubled.abs() <= 2 * least, 1.5 * least * 2.0**-fmt.bits, 0.0)


def _named(finding: Finding, relation: str, exact: bool) -> Finding:
    """The finding says which relation is broken; `want` is what the plain call gave."""
    how = "the bits of" if exact else "twice the bound of"
    return replace(finding, message=f"relation {relation} is broken: the plain call gave another result, outside {how} it")
