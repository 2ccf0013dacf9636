"""Planted faults of quantised stages (docs/faults.md sections 2 and 7), in every scheme they apply to: caught, stage named."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from quant_pipeline import QuantPipeline, first_finding, planted

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.reference.contract import SCHEMES, Inputs, Quantiser, QuantScheme
from moeproof.reference.eager.quantise import Matrix, activations, encode, matmul, quantise, weights

Tensor = torch.Tensor
QUANTISED = [s for s in SCHEMES.values() if s.quantised]
CASE = "T=9,H=256,I=128,E=3,K=2"


@functools.lru_cache(maxsize=64)
def inputs_of(line: str) -> Inputs:
    return make_inputs(parse_case(line))


@dataclass(frozen=True)
class Fault:
    """One planted fault: where it applies, what it does, which stage must be named, and the inputs that trigger it."""

    id: str
    stage: str
    applies: Callable[[QuantScheme], bool]
    plant: Callable[[QuantScheme], QuantPipeline]
    case: str = "values=groups"
    seeds: int = 1
    """How many seeds to look through: one amax of the whole tensor rounds in one way only, which may be the healthy one."""


def _q1(change: Callable[[Tensor, Quantiser, Tensor | None], tuple[Tensor, Tensor]]) -> Callable[[QuantScheme], QuantPipeline]:
    return lambda scheme: planted(quant1=change)


def _q2(change: Callable[[Tensor, Quantiser, Tensor | None], tuple[Tensor, Tensor]]) -> Callable[[QuantScheme], QuantPipeline]:
    return lambda scheme: planted(quant2=change)


def _grouped(q: Quantiser | None) -> bool:
    return q is not None and q.group[1] != 0


def _power_rule(x: Tensor, q: Quantiser, exponent: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Quantise MX groups with another rule for the exponent of each group's amax."""
    amax = x.float().abs().unflatten(1, (-1, 32)).amax(dim=2)
    e = torch.where(amax > 0, exponent(amax.clamp(min=1e-30)), -127.0).clamp(-127, 127)
    scale = torch.exp2(e.double()).repeat_interleave(32, dim=1)
    return encode((x.double() / scale).float(), q.format), (e + 127).to(torch.uint8)


def zero_block_nan(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    bare = replace(q, floor=0.0, quotient="divide")
    codes, scale = quantise(x, bare, x.dtype, given)
    return codes, scale


def transposed(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = quantise(x, q, x.dtype, given)
    return codes, scale.T.reshape(scale.shape)


def collapsed(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = quantise(x, q, x.dtype, given)
    return codes, scale.view(torch.uint8).amax().expand(scale.shape).to(torch.uint8) if scale.dtype == torch.uint8 else (
        scale.float().amax().expand(scale.shape).to(scale.dtype)
    )


def other_maximum(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scale = quantise(x, q, x.dtype, given)
    return codes, (scale * (q.format.max / (240.0 if not q.format.integer else 128.0))).to(scale.dtype)


def other_quotient(name: str) -> Callable[[Tensor, Quantiser, Tensor | None], tuple[Tensor, Tensor]]:
    return lambda x, q, given: quantise(x, replace(q, quotient=name), x.dtype, given)


def by_tensor(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """One scale for all rows, in the shape of a scale each: what a small-batch path of another kernel does."""
    codes, scale = quantise(x, replace(q, group=(0, 0)), x.dtype, given)
    return codes, scale.expand(q.scale_shape(*x.shape)).contiguous()


def dynamic(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    return quantise(x, replace(q, static=False), x.dtype, None)


def nan_rows(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """A row of zeros divides by 0, and a masked multiply lets the NaN through."""
    codes, scale = quantise(x, q, x.dtype, given)
    zero = (x == 0).all(dim=1, keepdim=True)
    if scale.dtype == torch.uint8:
        return codes, torch.where(zero, 255, scale).to(torch.uint8)
    return codes, torch.where(zero, torch.nan, scale.float()).to(scale.dtype)


def ties(x: Tensor, q: Quantiser, nudge: float) -> tuple[Tensor, Tensor]:
    """The healthy scales, and codes of values moved away from zero or toward it by less than any bf16 step."""
    _, scale = quantise(x, q, x.dtype, None)
    codes, _ = quantise(x.double() * (1 + nudge), q, x.dtype, None) if nudge else quantise(x, q, x.dtype, None)
    return codes, scale


def scales_as(change: Callable[[Tensor], Tensor]) -> Callable[..., Matrix]:
    def rows(codes: Tensor, scale: Tensor, q: Quantiser, g: Tensor | None, dtype: torch.dtype) -> Matrix:
        m = activations(codes, scale, q, dtype, g)
        assert m.scales is not None
        return replace(m, scales=change(m.scales))

    return rows


def without_global(codes: Tensor, scale: Tensor, q: Quantiser, g: Tensor | None, dtype: torch.dtype) -> Matrix:
    return activations(codes, scale, q, dtype, None)


def weights_with(change: Callable[[Matrix], Matrix]) -> Callable[[QuantScheme], QuantPipeline]:
    def load(inputs: Inputs, name: str, expert: int) -> Matrix:
        t = {n: None if (v := getattr(inputs, f"{name}{n}")) is None else v[expert] for n in ("", "_scale", "_zp", "_global")}
        q = inputs.problem.quant.w
        return change(weights(t[""], t["_scale"], t["_zp"], t["_global"], q, inputs.problem.fmt.dtype))  # type: ignore[arg-type]

    return lambda scheme: planted(weights=load)


def _scales(m: Matrix, change: Callable[[Tensor], Tensor]) -> Matrix:
    assert m.scales is not None
    return replace(m, scales=change(m.scales))


def window(step: int) -> Callable[[Matrix, Matrix], Tensor]:
    """Every tile of `step` columns takes the weights' next scale, whatever the group: index tile instead of column / group."""

    def product(x: Matrix, w: Matrix) -> Tensor:
        assert w.scales is not None
        groups = w.scales.size(1)
        wrong = torch.stack([w.scales[:, min(t, groups - 1)] for t in range(-(-w.numbers.size(1) // step))], dim=1)
        if step > w.size:
            wrong = w.scales[:, :: step // w.size].repeat_interleave(step // w.size, dim=1)[:, :groups]
            return matmul(x, replace(w, scales=wrong))
        return matmul(x, Matrix(w.numbers, wrong, step, w.integer))

    return product


def tail_nan(x: Matrix, w: Matrix) -> Tensor:
    """The scale of the short last tile is read past its row, where 0xFF bytes lie."""
    assert w.scales is not None
    return matmul(x, replace(w, scales=torch.cat([w.scales[:, :-1], torch.full_like(w.scales[:, -1:], torch.nan)], dim=1)))


def block_from_grid(m: Matrix) -> Matrix:
    """Ragged blocks: the block size inferred as columns / scale columns, 200 / 2 = 100 instead of 128 and 72."""
    assert m.scales is not None
    width = -(-m.numbers.size(1) // m.scales.size(1))
    each = m.scales.repeat_interleave(width, dim=1)[:, : m.numbers.size(1)]
    return Matrix(m.numbers, each, 1, m.integer)


def amax_in_few_bits(x: Tensor, q: Quantiser, given: Tensor | None) -> tuple[Tensor, Tensor]:
    """amax rounded up to 4 mantissa bits before its exponent is taken: what lies just below a power of two reaches it."""
    amax = x.float().abs().unflatten(1, (-1, 32)).amax(dim=2)
    mantissa, exponent = torch.frexp(amax)
    coarse = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    _, e = torch.frexp(coarse)
    floor = (e - 1 - q.format.emax).double()
    if q.rule == "round_up":
        m, e = torch.frexp(coarse / q.format.max)
        floor = torch.where(m == 0.5, e - 1, e).double()
    e = torch.where(amax > 0, floor, -127.0).clamp(-127, 127)
    scale = torch.exp2(e).repeat_interleave(32, dim=1)
    return encode((x.double() / scale).float(), q.format), (e + 127).to(torch.uint8)


def _a1(test: Callable[[Quantiser], bool]) -> Callable[[QuantScheme], bool]:
    return lambda s: s.a1 is not None and test(s.a1)


def _a2(test: Callable[[Quantiser], bool]) -> Callable[[QuantScheme], bool]:
    return lambda s: s.a2 is not None and test(s.a2)


def _w(test: Callable[[Quantiser], bool]) -> Callable[[QuantScheme], bool]:
    return lambda s: s.w is not None and test(s.w)


def _mx(exponent: Callable[[Tensor, Quantiser], Tensor]) -> Callable[[QuantScheme], QuantPipeline]:
    return _q1(lambda x, q, given: _power_rule(x, q, lambda amax: exponent(amax, q)))


def _plan(**steps: object) -> Callable[[QuantScheme], QuantPipeline]:
    return lambda scheme: planted(**steps)


IS_MX = _a1(lambda q: q.scale == "e8m0")
EDGES, TIES, RAGGED = "values=edges", "values=ties,T=5", "values=groups,H=200"

FAULTS = [
    Fault("P11.zero_block_nan", "QUANT1", _a1(lambda q: q.rule == "amax" and q.by_token), _q1(zero_block_nan), EDGES),
    Fault("P12.scale_order", "QUANT1", _a1(_grouped), _q1(transposed)),
    Fault(
        "P12.weight_scale_order",
        "GEMM1",
        _w(lambda q: _grouped(q) and q.group[0] == 1),
        weights_with(lambda m: _scales(m, lambda s: s.T.reshape(s.shape))),
    ),
    Fault("P13a.nearest", "QUANT1", IS_MX, _mx(lambda a, q: torch.round(torch.log2(a / q.format.max)))),
    Fault("P13b.floor_of_ratio", "QUANT1", IS_MX, _mx(lambda a, q: torch.floor(torch.log2(a / q.format.max)))),
    Fault(
        "P13c.one_off_at_a_power",
        "QUANT1",
        _a1(lambda q: q.rule == "round_up"),
        _mx(lambda a, q: torch.floor(torch.log2(a / q.format.max)) + 1),
        EDGES,
    ),
    Fault("P13d.amax_via_fewer_bits", "QUANT1", IS_MX, _q1(amax_in_few_bits), EDGES),
    Fault("P14.granularity_collapse", "QUANT1", _a1(lambda q: q.by_token), _q1(collapsed)),
    Fault("P15.max_constant", "QUANT1", _a1(lambda q: q.rule == "amax" and not q.static), _q1(other_maximum)),
    Fault("P16.padding_in_amax", "QUANT2", _a2(lambda q: not q.by_token and not q.static), _plan(dead=1e4), "routing=minus1"),
    Fault("P17.global_scale_lost", "GEMM1", _a1(lambda q: q.two_level), _plan(rows1=without_global)),
    Fault("P18.scale_reinterpreted", "GEMM1", IS_MX, _plan(rows1=scales_as(lambda t: torch.log2(t) + 127))),
    Fault("P41a.scale_advances_per_tile", "GEMM1", _w(lambda q: q.group == (1, 128)), _plan(product=window(64))),
    Fault(
        "P41b.one_scale_for_two_groups",
        "GEMM1",
        _w(lambda q: q.group in ((1, 16), (1, 32), (1, 64))),
        _plan(product=window(128)),
    ),
    Fault(
        "P45.tail_scale_oob", "GEMM1", _w(lambda q: q.ragged and _grouped(q)), _plan(product=tail_nan), "values=groups,H=200"
    ),
    Fault("P56.static_scale_ignored", "QUANT2", _a2(lambda q: q.static and not q.two_level), _q2(dynamic)),
    Fault("P57.zero_row_nan", "QUANT2", _a2(lambda q: q.by_token), _q2(nan_rows), EDGES),
    Fault("P58.row_scale_shift", "GEMM2", _a2(lambda q: q.by_token), _plan(rows2=scales_as(lambda t: t.roll(1, 0)))),
    Fault("P59.scheme_by_m", "QUANT2", _a2(lambda q: q.by_token and q.rule == "amax"), _q2(by_tensor)),
    # wrong quantisers met in the field
    Fault("field.ties_away", "QUANT1", IS_MX, _q1(lambda x, q, given: ties(x, q, 2.0**-20)), "values=normal"),
    Fault("field.ties_toward_zero", "QUANT1", IS_MX, _q1(lambda x, q, given: ties(x, q, -(2.0**-20))), "values=normal"),
    Fault(
        "field.divide_for_multiply",
        "QUANT1",
        _a1(lambda q: q.quotient in ("reciprocal", "inverse") and not q.static),
        _q1(other_quotient("divide")),
        TIES,
        seeds=32,
    ),
    Fault(
        "field.multiply_for_divide",
        "QUANT1",
        _a1(lambda q: q.quotient == "divide" and q.rule == "amax"),
        _q1(other_quotient("reciprocal")),
        TIES,
        seeds=32,
    ),
    Fault(
        "field.zero_point_ignored",
        "GEMM1",
        _w(lambda q: q.zero_points),
        weights_with(lambda m: replace(m, numbers=m.numbers + 1)),
    ),
    Fault(
        "field.block_from_grid",
        "GEMM1",
        _w(lambda q: q.group == (128, 128)),
        weights_with(block_from_grid),
        "values=groups,H=200",
    ),
]


def _line(scheme: QuantScheme, extra: str, seed: int = 5) -> str:
    options = dict(part.split("=") for part in f"{CASE},scheme={scheme.name},{extra},seed={seed}".split(","))
    return ",".join(f"{k}={v}" for k, v in options.items())


PAIRS = [(fault, scheme) for fault in FAULTS for scheme in QUANTISED if fault.applies(scheme)]


@pytest.mark.parametrize(("fault", "scheme"), PAIRS, ids=lambda v: v.id if isinstance(v, Fault) else v.name)
def test_planted_fault_is_caught_at_its_stage(fault: Fault, scheme: QuantScheme) -> None:
    finding = None
    for seed in range(5, 5 + fault.seeds):
        finding = finding or first_finding(fault.plant(scheme), inputs_of(_line(scheme, fault.case, seed)))

    assert finding is not None, "not caught"
    assert str(finding.stage) == fault.stage, finding


@pytest.mark.parametrize("scheme", QUANTISED, ids=lambda s: s.name)
def test_the_healthy_twin_raises_no_alarm(scheme: QuantScheme) -> None:
    for extra in sorted({fault.case for fault in FAULTS if fault.applies(scheme)}):
        assert first_finding(QuantPipeline(), inputs_of(_line(scheme, extra))) is None, extra


def test_every_fault_applies_somewhere() -> None:
    assert {fault.id for fault, _ in PAIRS} == {fault.id for fault in FAULTS}
