"""Planted faults of quantised stages in every scheme that they can happen in: caught, stage named.

The public classes are those of the catalogue, each on the case that `moeproof faults` caught it with; the others are wrong
quantisers met in the field.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED, scheme_cases
from moeproof.harness.faults.catalogue import CATALOGUE, by_id, scales
from moeproof.harness.faults.fault import Edit, plant
from moeproof.harness.faults.pipeline import CLAIMS
from moeproof.harness.faults.quant_pipeline import Coded, QuantPipeline
from moeproof.harness.judging.expect import Expectation, judge_shown
from moeproof.harness.judging.memory import Poison, guard_inputs
from moeproof.harness.verdict import Finding
from moeproof.reference.contract import Inputs, Quantiser, Stage
from moeproof.reference.eager.quantise import Matrix, quantise

Tensor = torch.Tensor
RESULTS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "faults-cpu.json").read_text(encoding="utf-8"))
CAUGHT_BY = {(h["id"], h["variant"], h["scheme"]): h["at"] for h in RESULTS["hunts"]}
PLANTINGS = [(f, v, s) for f in CATALOGUE if f.ground == "quant" for v, s in f.plantings]
# By case, so that one set of inputs serves all that share it.
PLANTINGS.sort(key=lambda p: CAUGHT_BY[p[0].id, p[1], p[2]])


@functools.lru_cache(maxsize=4)
def _inputs(line: str) -> Inputs:
    return make_inputs(parse_case(line), "cpu")


def _first_finding(line: str, edit: Edit, armed: bool = True) -> Finding | None:
    """One call under one poison pattern, all tensors judged: the first finding, None where all is well."""
    pipeline = QuantPipeline()
    plant(pipeline, edit, armed)
    with Poison("nan"):
        shown = pipeline(guard_inputs(_inputs(line), "nan")[0])
    results, _ = judge_shown(shown, Expectation(_inputs(line), CLAIMS))
    return next((f for r in results.values() for f in r.findings), None)


@pytest.mark.parametrize(
    ("fault", "variant", "scheme"), PLANTINGS, ids=lambda x: getattr(x, "id", str(x).replace(" ", "-") or "only")
)
def test_a_public_class_is_caught_in_every_scheme(fault: Any, variant: str, scheme: str) -> None:
    finding = _first_finding(CAUGHT_BY[fault.id, variant, scheme], fault.variants[variant])

    assert finding is not None, "not caught"
    assert finding.stage in fault.blame, finding


CLASSES = [*(f"P{n}" for n in (*range(11, 19), 24, 25, 41, 45, *range(56, 60)))]
"""The classes that are about quantisation."""


def test_every_class_is_caught_in_every_scheme_or_says_why_it_cannot_happen_there() -> None:
    """Of each class and scheme: a planting that the committed campaign caught at the right stage, or one reason."""
    caught = {(h["id"], h["scheme"]) for h in RESULTS["hunts"] if h["triggered"] and h["caught"] and h["right_stage"]}
    missed = {(h["id"], h["scheme"]) for h in RESULTS["hunts"] if not (h["caught"] and h["right_stage"])}
    for fault in map(by_id, CLASSES):
        reasons = {scheme: why for why, schemes in fault.not_in.items() for scheme in schemes}
        for scheme in QUANTISED:
            assert ((fault.id, scheme) in caught) != (scheme in reasons), (fault.id, scheme, reasons.get(scheme))

    assert not missed and [f.id for f in CATALOGUE if f.ground == "quant"] == CLASSES


@pytest.mark.parametrize(
    ("weights", "words"),
    [(("nvfp4",), "nvfp4_w4a16 must be planted.*given 0 reasons"), (QUANTISED, "fp8_tensor must be.*both planted and not")],
    ids=["forgotten", "both"],
)
def test_a_class_that_forgets_a_scheme_or_contradicts_itself_is_refused(weights: tuple[str, ...], words: str) -> None:
    fault = by_id("P17")

    with pytest.raises(ValueError, match=f"P17: scheme {words}"):
        replace(fault, schemes=fault.schemes | {"weights": weights})


@pytest.mark.parametrize("scheme", QUANTISED)
def test_the_healthy_pipeline_raises_no_alarm(scheme: str) -> None:
    for case in scheme_cases(scheme):
        assert _first_finding(str(case), {}) is None, str(case)


@dataclass(frozen=True)
class Field:
    """A wrong quantiser met in the field; `values` are those that show it."""

    name: str
    stage: Stage
    schemes: tuple[str, ...]
    edit: Edit
    values: str
    seeds: int = 1
    """How many to look through: one amax of the whole tensor rounds in one way only, which may be the healthy one."""


def _ties(nudge: float) -> Edit:
    """The healthy scales, and codes of values moved by less than any bf16 step."""

    def wrong(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Tensor | None) -> Coded:
        return Coded(quantise(x.double() * (1 + nudge), q, x.dtype, None)[0], right.scales)

    return {"quant1": wrong}


def _quotient(name: str) -> Edit:
    def wrong(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Tensor | None) -> Coded:
        return Coded(*quantise(x, replace(q, quotient=name), x.dtype, given))

    return {"quant1": wrong}


def _block_from_grid(right: Matrix, _: Any, inputs: Inputs, name: str, expert: int) -> Matrix:
    """Ragged blocks: the block size inferred as columns / scale columns, 200 / 2 = 100 instead of 128 and 72."""
    assert right.scales is not None
    width = -(-right.numbers.size(1) // right.scales.size(1))
    each = right.scales.repeat_interleave(width, dim=1)[:, : right.numbers.size(1)]
    return Matrix(right.numbers, each, 1, right.integer)


def _zero_point_ignored(right: Matrix, _: Any, inputs: Inputs, name: str, expert: int) -> Matrix:
    return replace(right, numbers=right.numbers + 1)


def _zero_for_least(m: Matrix) -> Matrix:
    """float32 built by shifting an e8m0 code into the exponent field: code 0 becomes 0, where it means 2^-127."""
    assert m.scales is not None
    return replace(m, scales=torch.where(m.scales == 2.0**-127, 0.0, m.scales))


def _rows_shifted(right: Matrix, _: Any, name: str, *rest: Any) -> Matrix:
    return _zero_for_least(right) if name == "gemm1" else right


def _weights_shifted(right: Matrix, _: Any, inputs: Inputs, name: str, expert: int) -> Matrix:
    return _zero_for_least(right) if name == "w2" else right


MX = scales.in_x(scales.is_mx)
LEAST = scales.schemes(lambda s: all(q is not None and scales.is_mx(q) for q in (s.w, s.a1 or s.w)))
"""Schemes that the exact probe of the least scale is for."""
FIELD = (
    Field("ties-away", Stage.QUANT1, MX, _ties(2.0**-20), "normal"),
    Field("ties-toward-zero", Stage.QUANT1, MX, _ties(-(2.0**-20)), "normal"),
    Field(
        "divide-for-multiply",
        Stage.QUANT1,
        scales.in_x(lambda q: q.quotient in ("reciprocal", "inverse") and not q.static),
        _quotient("divide"),
        "ties",
        32,
    ),
    Field(
        "multiply-for-divide",
        Stage.QUANT1,
        scales.in_x(lambda q: q.quotient == "divide" and q.rule == "amax"),
        _quotient("reciprocal"),
        "ties",
        32,
    ),
    Field(
        "zero-point-ignored", Stage.GEMM1, scales.in_w(lambda q: q.zero_points), {"load_weights": _zero_point_ignored}, "groups"
    ),
    Field(
        "block-from-grid",
        Stage.GEMM1,
        scales.in_w(lambda q: q.group == (128, 128)),
        {"load_weights": _block_from_grid},
        "groups,H=200",
    ),
    Field("e8m0-zero-in-x", Stage.GEMM1, MX, {"load_rows": _rows_shifted}, "least"),
    Field("e8m0-zero-in-w2", Stage.GEMM2, LEAST, {"load_weights": _weights_shifted}, "least"),
)


def _line(scheme: str, field: Field, seed: int) -> str:
    sizes = {"T": "5" if field.values == "ties" else "9", "H": "256", "I": "128", "E": "3", "K": "2", "scheme": scheme}
    sizes |= dict(part.split("=") for part in f"values={field.values},seed={seed}".split(","))
    return ",".join(f"{k}={v}" for k, v in sizes.items())


@pytest.mark.parametrize(("field", "scheme"), [(f, s) for f in FIELD for s in f.schemes], ids=lambda v: getattr(v, "name", v))
def test_a_wrong_quantiser_of_the_field_is_caught_at_its_stage(field: Field, scheme: str) -> None:
    lines = [_line(scheme, field, seed) for seed in range(5, 5 + field.seeds)]
    finding = next((f for line in lines if (f := _first_finding(line, field.edit)) is not None), None)

    assert finding is not None, "not caught"
    assert finding.stage is field.stage, finding
    assert _first_finding(lines[0], field.edit, armed=False) is None
