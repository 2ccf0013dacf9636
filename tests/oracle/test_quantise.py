"""Quantisers against a scalar reading of the scheme table, at ordinary values and where the rules differ."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.schemes import ALL, SCHEMES, Quantiser
from moeproof.reference.eager import quantise as eager
from moeproof.reference.oracle import standard
from moeproof.reference.oracle.quant_stages import quant1, quant1_input
from moeproof.reference.oracle.quantise import dequantise, fl, quantise, reduce_groups

BF16 = FORMATS["bf16"]
ROWS = {f"{name}.{side}": getattr(s, side) for name, s in SCHEMES.items() for side in ("a1", "w") if getattr(s, side)}
"""Every distinct quantiser of the table, by the scheme that has it."""
ACTIVATIONS = {name: q for name, q in ROWS.items() if name.endswith("a1")}


def _fl(x: float) -> float:
    """A float32 operation's result."""
    return struct.unpack("f", struct.pack("f", x))[0]


def scalar(group: list[float], q: Quantiser, given: float | None, whole: list[float]) -> tuple[list[float], float, float]:
    """One group by hand: (values of the codes, stored scale, zero point). Follows RULES and QUOTIENTS word by word."""
    fmt, floor = q.format, _fl(q.floor)
    amax = max((abs(x) for x in group), default=0.0)
    floored = max(amax, floor)
    z, S = 0.0, given
    if q.rule == "amax":
        s = given if q.static and given is not None else _fl(floored / fmt.max)
    elif q.rule == "ocp_floor":
        s = 2.0 ** max(-127, math.floor(math.frexp(amax)[1] - 1) - fmt.emax) if amax else 2.0**-127
    elif q.rule == "round_up":
        e = -127
        while amax > fmt.max * 2.0**e:
            e += 1
        s = 2.0**e
    elif q.two_level:
        full, peak = 448.0 * fmt.max, max(max(abs(x) for x in whole), floor)
        if S is None:
            S = _fl(peak / full) if q.rule == "two_level_decode" else _fl(full / peak)
        s = _fl(amax / fmt.max)
        s = _fl(s / S) if q.rule == "two_level_decode" else _fl(s * S)
    elif q.rule == "signed":
        s = max(_fl(max(group) / 7), _fl(-min(group) / 8))
    else:
        s = _fl((max(*group, 0.0) - min(*group, 0.0)) / 15)
    form = q.scale_format(BF16)
    if not (q.static and not q.two_level) and form.name != "e8m0":
        s = max(standard.round_value(s, form), form.least)
    if q.rule == "zero_point":
        z = standard.round_value(_fl(-min(*group, 0.0) / s), fmt)
        return [min(max(round(_fl(x / s)) + z, 0), 15) for x in group], s, z
    ratios = {
        "divide": lambda x: _fl(x / s),
        "reciprocal": lambda x: _fl(x * _fl(1 / s)),
        "inverse": lambda x: _fl(x * _fl(fmt.max / floored)),
        "two_level_decode": lambda x: _fl(x / _fl(s * S)),
        "two_level_encode": lambda x: _fl(x * _fl(S / s)),
    }
    return [standard.round_value(ratios[q.quotient](x), fmt) for x in group], s, z


def _values(columns: int, rows: int = 4, seed: int = 0) -> torch.Tensor:
    """bf16 values over 9 binades per row, with a row of zeros and amax at and next to powers of two."""
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0 ** torch.arange(-4, rows - 4)[:, None]
    x[1] = 0.0
    x[2, ::16] = 4.0
    x[3, ::16] = torch.tensor([4.0, 3.984375, 4.03125, 6.0] * columns)[: len(x[3, ::16])]
    return x.bfloat16().double()


@pytest.mark.parametrize("name", ROWS)
def test_every_group_is_what_the_table_says(name: str) -> None:
    q = ROWS[name]
    x = _values(160 if q.ragged else 256)
    given = 0.0173 if q.static and not q.two_level else 0.0031 if q.static else None
    tensor = None if given is None else torch.full((1, 1), _fl(given), dtype=torch.float64)
    made = quantise(x, q, BF16, tensor)
    rows, columns = (x.shape[0], x.shape[1])
    height, width = q.group[0] or rows, q.group[1] or columns

    for top in range(0, rows, height):
        for left in range(0, columns, width):
            part = x[top : top + height, left : left + width]
            codes, s, z = scalar(part.flatten().tolist(), q, None if given is None else _fl(given), x.flatten().tolist())
            at = (top // height, left // width)
            assert float(made.s[at]) == s, at
            assert made.q[top : top + height, left : left + width].flatten().tolist() == codes, at
            assert made.z is None or float(made.z[at]) == z


@pytest.mark.parametrize("name", ROWS)
def test_stored_form_decodes_to_the_same_values(name: str) -> None:
    q = ROWS[name]
    x = _values(256)
    made = quantise(x, q, BF16, torch.full((1, 1), 0.01).double() if q.static else None)
    back = dequantise(q, BF16, made.codes(), made.scale(BF16), made.zero_points(), made.g)

    assert made.codes().shape == q.code_shape(4, 256) and made.scale(BF16).shape == q.scale_shape(4, 256)
    assert torch.equal(back.values, made.values) and bool(back.values.isfinite().all())
    assert bool((back.values[1] == 0).all()), "a row of zeros decodes to zeros"


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("columns", [32, 64, 130, 256])
def test_the_eager_reading_gives_the_same_bits(name: str, columns: int) -> None:
    q = ACTIVATIONS[name]
    if not q.ragged and columns % 32:
        columns = 160
    x = _values(columns, rows=9, seed=columns).bfloat16()
    given = torch.full((1, 1), 0.0173) if q.static else None
    codes, scale = eager.quantise(x, q, torch.bfloat16, given)
    made = quantise(x.double(), q, BF16, None if given is None else given.double())

    for got, want in ((codes, made.codes()), (scale, made.scale(BF16))):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert torch.equal(got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("name", [n for n, q in ROWS.items() if q.rule in ("ocp_floor", "round_up")])
@pytest.mark.parametrize("k", [-120, -20, 0, 3, 100])
def test_power_of_two_scales_at_and_next_to_powers_of_two(name: str, k: int) -> None:
    """A logarithm in float32 is off by one here (fault P13): amax at 2^k, one ulp below, one above, and at max * 2^k."""
    q = ROWS[name]
    for amax in (2.0**k, _fl(2.0**k * (1 - 2.0**-24)), _fl(2.0**k * (1 + 2.0**-23)), q.format.max * 2.0**k):
        for one in (amax, _fl(amax * (1 + 2.0**-23))):
            row = torch.zeros(1, 32, dtype=torch.float64)
            row[0, 5] = one
            s = float(quantise(row, q, BF16).s)
            if q.rule == "round_up":
                assert one <= q.format.max * s and (s == 2.0**-127 or one > q.format.max * s / 2)
            else:
                assert 2.0**q.format.emax * s <= one < 2.0 ** (q.format.emax + 1) * s or s == 2.0**-127


def test_mx_rules_differ_where_the_documents_say() -> None:
    """Exponent at amax 6.1, 8.0, 4.0: up 1/1/0, OCP 0/1/0 (docs/tolerances.md section 8)."""
    up, ocp = ROWS["mxfp4_w4a4_up.a1"], ROWS["mxfp4_w4a4.a1"]
    for amax, exponents in ((6.1, (1, 0)), (8.0, (1, 1)), (4.0, (0, 0))):
        row = torch.zeros(1, 32, dtype=torch.float64)
        row[0, 0] = amax
        assert tuple(math.frexp(float(quantise(row, q, BF16).s))[1] - 1 for q in (up, ocp)) == exponents


def test_ragged_groups_are_cut_by_the_scheme_not_by_the_scale_grid() -> None:
    """130 columns in groups of 128 are 128 and 2; dividing 130 by the grid's 2 columns gives 65 and 65."""
    q = SCHEMES["fp8_block"].a1
    assert q is not None
    x = torch.ones(1, 130, dtype=torch.float64)
    x[0, 128:] = 64.0
    made = quantise(x, q, BF16)
    inferred = made.q * made.s.repeat_interleave(65, dim=1)

    assert torch.allclose(made.values, x)
    assert float((inferred - x).abs().max()) > 60


def test_static_scale_missing_is_refused() -> None:
    q = SCHEMES["fp8_tensor_static"].a1
    assert q is not None
    with pytest.raises(ContractError, match="static"):
        quantise(torch.ones(1, 4, dtype=torch.float64), q, BF16)


def test_a_group_with_nan_does_not_reach_its_neighbours() -> None:
    x = _values(256)
    dirty = x.clone()
    dirty[0, 3] = math.nan
    q = ROWS["fp8_block.a1"]
    clean, made = quantise(x, q, BF16), quantise(dirty, q, BF16)

    assert made.defined is not None and not bool(made.defined[0, :128].any()) and bool(made.defined[0, 128:].all())
    assert torch.equal(made.q[1:], clean.q[1:]) and torch.equal(made.s[1:], clean.s[1:])


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (3, 130)])
@pytest.mark.parametrize("name", ["fp8_tensor.a1", "fp8_token.a1", "fp8_block.a1", "fp8_block.w"])
def test_empty_and_short_tensors_have_the_contract_shape(name: str, shape: tuple[int, int]) -> None:
    q = ROWS[name]
    made = quantise(torch.zeros(shape, dtype=torch.float64), q, BF16)

    assert tuple(made.s.shape) == q.scale_shape(*shape) and made.q.shape == shape
    assert reduce_groups(torch.ones(shape, dtype=torch.float64), q, "amax").shape == made.s.shape


def test_float32_quotients_round_once() -> None:
    """A float64 quotient rounded to float32 is the float32 quotient."""
    g = torch.Generator().manual_seed(3)
    a, b = torch.randn(100_000, generator=g), torch.rand(100_000, generator=g) + 0.1

    assert torch.equal(fl(a.double() / b.double()).float(), a / b)
    assert torch.equal(fl(a.double() * b.double()).float(), a * b)


def test_all_is_the_whole_dim() -> None:
    assert ALL == 0 and isinstance(BF16, Format)


def test_a_token_whose_id_no_expert_has_is_a_row_of_zeros_to_quant1() -> None:
    """Its weight may be NaN, and one scale for all tokens must not be: with the weight on the input, neither counts."""
    inputs = make_inputs(parse_case("T=9,H=64,I=48,E=5,K=1,scheme=fp8_tensor,weight_on_input=1,routing=beyond,seed=1"))
    beyond = inputs.topk_ids.flatten() >= 5
    x = quant1_input(inputs)

    assert bool(beyond.any()) and not bool(beyond.all())
    assert bool((x[beyond] == 0).all()) and bool((x[~beyond] != 0).any(dim=1).all())
    assert bool(quant1(inputs).values.isfinite().all())
