"""The input lint: each rule sees the inputs it is there to refuse, and a complaint alone makes a verdict VACUOUS."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging import trial
from moeproof.harness.judging.expect import Expectation
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.lint import complaints
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Claims, Inputs
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.schemes import SCHEMES
from moeproof.reference.eager import candidates
from moeproof.reference.oracle.codes import from_codes

Tensor = torch.Tensor
LAYER = "T=33,H=104,I=72,E=8,K=2"
SCALED = "T=7,H=128,I=128,E=3,K=2,scheme=mxfp8"


def quiet_x(i: Inputs) -> Inputs:
    return i.map({"hidden_states": i.hidden_states / 16})


def loud_x(i: Inputs) -> Inputs:
    return i.map({"hidden_states": i.hidden_states * 16})


def halves_alike(i: Inputs) -> Inputs:
    gate, up = i.w1.chunk(2, dim=1)
    return i.map({"w1": torch.cat([gate, up * 1.5625], dim=1)})


def quiet_w2(i: Inputs) -> Inputs:
    return i.map({"w2": i.w2 / 256})


def weights_alike(i: Inputs) -> Inputs:
    return i.map({"topk_weights": torch.full_like(i.topk_weights, 0.5)})


def weight_of_zero(i: Inputs) -> Inputs:
    weights = i.topk_weights.clone()
    weights[3, 1] = 0.0
    return i.map({"topk_weights": weights})


def twins(i: Inputs) -> Inputs:
    w = i.w1.clone()
    w[5] = w[2]
    return i.map({"w1": w})


def scales_alike(i: Inputs) -> Inputs:
    assert i.w2_scale is not None
    return i.map({"w2_scale": i.w2_scale[:, :, :1].expand_as(i.w2_scale).contiguous()})


HIDES: tuple[tuple[str, Callable[[Inputs], Inputs], str], ...] = (
    (LAYER, quiet_x, "pre-activations have an rms of"),
    (LAYER, loud_x, "pre-activations have an rms of"),
    (LAYER, halves_alike, "gate and up have the same rms"),
    (LAYER, quiet_w2, "expert outputs have an rms of"),
    (LAYER, weights_alike, "neighbouring routing weights differ by less than"),
    (LAYER, weight_of_zero, "a routing weight is not positive"),
    (LAYER, twins, "two experts have the same w1"),
    (f"{SCALED},values=groups", scales_alike, "w2_scale differ from the next group's"),
)


@pytest.mark.parametrize(("line", "hide", "words"), HIDES, ids=[hide.__name__ for _, hide, _ in HIDES])
def test_every_rule_has_inputs_that_it_refuses(
    line: str, hide: Callable[[Inputs], Inputs], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A seed of its own for each: the gate remembers what it said of a case.
    case = parse_case(f"{line},seed={[h for _, h, _ in HIDES].index(hide) + 2100}")
    assert list(complaints(case, Expectation(make_inputs(case), Claims()))) == []
    hidden = hide(make_inputs(case))
    found = list(complaints(case, Expectation(hidden, Claims())))

    assert found and words in found[0], found
    assert _judged(case, hidden, monkeypatch) == (Outcome.VACUOUS, found[-1])


def _judged(case: Case, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> tuple[Outcome, str]:
    """A healthy candidate on these inputs in place of the case's own."""

    def mine(_: Case, device: str) -> Inputs:
        return inputs

    caches = (trial.inputs_of, trial.expectation_of)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(trial, "make_inputs", mine)
    verdict = judge(next(c for c in candidates() if c.name == "eager-stages"), case, "cpu")
    for cache in caches:
        cache.cache_clear()
    return verdict.outcome, verdict.reason.split("; ")[-1]


@pytest.mark.parametrize("scheme", [name for name, s in SCHEMES.items() if s.quantised])
def test_every_code_is_used_somewhere(scheme: str) -> None:
    """Over a handful of cases: each code of the weights' format but NaN, in every nibble where two share a byte."""
    w = SCHEMES[scheme].w
    assert w is not None
    seen: set[tuple[int, int]] = set()
    for values in ("groups", "normal", "hetero"):
        inputs = make_inputs(parse_case(f"T=1,H=256,I=256,E=4,K=1,scheme={scheme},values={values},seed=3"))
        for codes in (inputs.w1, inputs.w2):
            for place, part in enumerate(_parts(codes, w.format.per_byte)):
                seen |= {(place, code) for code in part.unique().tolist()}

    wanted = _every_code(w.format)
    missing = {(place, code) for place in range(w.format.per_byte) for code in wanted} - seen
    assert not missing, sorted(missing)


def _parts(codes: Tensor, per_byte: int) -> tuple[Tensor, ...]:
    raw = codes.contiguous().view(torch.uint8)
    return (raw & 15, raw >> 4) if per_byte == 2 else (raw,)


def _every_code(fmt: Format) -> set[int]:
    """Codes of finite values that quantisers use."""
    codes = torch.arange(1 << fmt.width, dtype=torch.int64).to(torch.uint8)
    values = from_codes(codes, fmt)
    return set(codes[values.isfinite() & (values >= fmt.low)].tolist())
