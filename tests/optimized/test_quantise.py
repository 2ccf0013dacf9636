"""QUANT1 and QUANT2 in Triton, bit for bit against a number-by-number reading of the scheme table."""

from __future__ import annotations

import math
from typing import Any

import plain_quant
import pytest
import torch
from plain_layer import DEVICE, local_index, normal, random_ids, strided
from plain_quant import QUANTISERS

from moeproof.optimized.activation import activate
from moeproof.optimized.quant.quantise import quantise
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, Activation, ContractError
from moeproof.reference.contract.schemes import Quantiser

Tensor = torch.Tensor
every_quantiser = pytest.mark.parametrize("name", QUANTISERS)
WIDTHS = {128: 200, 32: 96, 16: 48, 0: 100}
"""Columns by group size: ragged where groups may be, more than one group where there are groups."""


def columns(q: Quantiser) -> int:
    return WIDTHS[q.group[1]]


def static(q: Quantiser, experts: int = 0) -> Tensor | None:
    """Scales far from what the values would give: another one for each expert."""
    if not q.static:
        return None
    one = {"amax": 0.37, "two_level_decode": 2.3e-3, "two_level_encode": 310.0}[q.rule]
    if not experts:
        return torch.tensor([[one]], device=DEVICE)
    return (one * (1 + torch.arange(experts)) / 2).view(-1, 1, 1).float().to(DEVICE)


def wild(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows over 16 binades, ties of narrow formats, signed zeros, a row of zeros and one below every floor."""
    x = normal(1, rows, cols, dtype=torch.float64) * 2.0 ** ((torch.arange(rows, device=DEVICE) * 7 % 17) - 8)[:, None]
    x[0] = (torch.arange(cols, device=DEVICE) % 29 - 14) / 4
    x[0, 3] = -0.0
    x[1] = 0.0
    x[2] = 1e-12 if dtype != torch.float16 else 6e-8
    x[3, ::2] = -(2.0**-3)
    return x.to(dtype)


def check_bits(
    x: Tensor, q: Quantiser, got: tuple[Tensor, Tensor], given: Tensor | None, live: list[bool], owner: list[int] | None = None
) -> None:
    """Codes and scales of live rows; rows that are not live are not looked at."""
    each = None if given is None else [float(given.flatten()[owner[r] if owner else 0]) for r in range(x.size(0))]
    codes, scales = plain_quant.quantise(x.cpu(), q, each, live)
    got_codes, got_scales = plain_quant.unpacked(got[0].cpu(), q.format), plain_quant.stored_scales(got[1].cpu())
    compared = [r for r, alive in enumerate(live) if alive]

    assert [got_codes[r] for r in compared] == [codes[r] for r in compared]
    if q.by_token:
        assert [got_scales[r] for r in compared] == [[_number(s) for s in scales[r]] for r in compared]
    elif compared:
        assert got_scales == [[_number(scales[compared[0]][0])]]


def _number(scale: Any) -> float | int:
    return scale if isinstance(scale, int) else float(scale)


@every_quantiser
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows(name: str, dtype: torch.dtype) -> None:
    """From a view in which no elements are neighbours."""
    q = QUANTISERS[name]
    x, given = wild(6, columns(q), dtype), static(q)
    got = quantise(strided(x), q, _format(dtype), given)

    assert got[0].shape == q.code_shape(6, columns(q)) and got[0].dtype == q.format.dtype
    assert got[1].shape == q.scale_shape(6, columns(q)) and got[1].dtype == q.scale_format(_format(dtype)).dtype
    check_bits(x, q, got, given, [True] * 6)


def _format(dtype: torch.dtype) -> Any:
    return next(f for f in FORMATS.values() if f.dtype == dtype and f.name != "tf32")


@every_quantiser
def test_one_row_and_none(name: str) -> None:
    """A whole tensor has a scale even where it has no rows: that of the floor."""
    q = QUANTISERS[name]
    x, given = wild(4, columns(q), torch.bfloat16), static(q)
    check_bits(x[3:], q, quantise(x[3:], q, FORMATS["bf16"], given), given, [True])
    codes, scales = quantise(x[:0], q, FORMATS["bf16"], given)

    assert codes.shape == q.code_shape(0, columns(q))
    if not q.by_token and not q.static:
        assert scales.tolist() == [[float(plain_quant.F(1e-10) / plain_quant.F(q.format.max))]]


@every_quantiser
def test_powers_of_two_at_a_scale_group_s_edge(name: str) -> None:
    """amax at 2^k and beside it, where log2 and exp2 choose the wrong scale."""
    q = QUANTISERS[name]
    x = torch.zeros(12, columns(q), device=DEVICE)
    for r, base in enumerate((1.0, 2.0**9, 2.0**-9, 448.0)):
        for j, side in enumerate((math.inf, base, 0.0)):
            x[3 * r + j, 1 :: max(q.group[1], 16)] = float(torch.nextafter(torch.tensor(base), torch.tensor(side)))
    given = static(q)

    check_bits(x, q, quantise(x, q, FORMATS["fp32"], given), given, [True] * 12)


@pytest.mark.parametrize("name", [name for name, q in QUANTISERS.items() if q.by_token])
def test_a_group_that_is_not_finite_leaves_the_others_alone(name: str) -> None:
    q = QUANTISERS[name]
    x, given = wild(6, columns(q), torch.float32), static(q)
    want = quantise(x, q, FORMATS["fp32"], given)
    x[4, -1], x[5, -1] = math.nan, math.inf
    got = quantise(x, q, FORMATS["fp32"], given)
    width = q.group[1] or columns(q)
    before = (columns(q) - 1) // width
    bytes_ = before * width // q.format.per_byte

    for a, b, kept in ((got[0], want[0], bytes_), (got[1], want[1], before)):
        a, b = (t.view(torch.uint8) if t.dtype.itemsize == 1 else t for t in (a, b))
        assert torch.equal(a[:4], b[:4])
        assert torch.equal(a[4:, :kept], b[4:, :kept])


POISON = 0xA5


def poisoned(q: Quantiser, rows: int, cols: int, dtype: str) -> tuple[Tensor, Tensor]:
    codes = torch.full(q.code_shape(rows, cols), POISON, dtype=torch.uint8, device=DEVICE).view(q.format.dtype)
    scale = q.scale_format(FORMATS[dtype]).dtype
    bytes_ = torch.full((*q.scale_shape(rows, cols)[:-1], q.groups(cols) * scale.itemsize), POISON, dtype=torch.uint8)
    return codes, bytes_.to(DEVICE).view(scale)


def untouched(t: Tensor) -> bool:
    return bool((t.contiguous().view(torch.uint8) == POISON).all())


@every_quantiser
@pytest.mark.parametrize("layout", ["slots", "regions"])
def test_activation_and_requantisation(name: str, layout: str) -> None:
    """What is quantised is the activation as it is stored; dead rows hold NaN, are not read and not written."""
    q, act = QUANTISERS[name], Activation.parse("swigluoai")
    R, cols, e = 15, columns(q), 3
    if layout == "slots":
        slots, counts = Slots(random_ids(5, 5, 3, e, dead=0.3), e, e), None
        owner = [i for row in local_index(slots.ids, e, None) for i in row]
    else:
        slots, counts = None, torch.tensor([2, 0, 5], dtype=torch.int32, device=DEVICE)
        owner = [r // 5 if r % 5 < int(counts[r // 5]) else -1 for r in range(R)]
    live = [i >= 0 for i in owner]
    x = normal(2, R, 2 * cols, dtype=torch.bfloat16) * 3
    x[[r for r in range(R) if not live[r]]] = math.nan
    given = static(q, e if q.two_level else 0)
    h, want_h = (torch.full((R, cols), 7.0, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    into = poisoned(q, R, cols, "bf16")
    got = quantise(x, q, FORMATS["bf16"], given, act=act, slots=slots, counts=counts, h_RI=h, into=into)
    activate(x, want_h, act, slots=slots, counts=counts)

    assert torch.equal(h, want_h)
    check_bits(h, q, got, given, live, owner if q.two_level else None)
    dead = [r for r in range(R) if not live[r]]
    assert untouched(got[0].view(torch.uint8)[dead])
    if q.by_token:
        assert untouched(got[1].view(torch.uint8)[dead] if got[1].dtype.itemsize == 1 else got[1][dead])
    if q.static and not q.two_level:
        assert got[1] is given


def test_wide_rows_take_a_launch_of_their_own_for_the_activation() -> None:
    """Beyond FUSED columns; the bits are those of the activation that is shown."""
    q, act = QUANTISERS["int8_token.a1"], Activation.parse("silu")
    x = normal(4, 2, 2 * 8200, dtype=torch.bfloat16)
    h = torch.empty(2, 8200, dtype=torch.bfloat16, device=DEVICE)
    got = quantise(x, q, FORMATS["bf16"], act=act, h_RI=h)

    check_bits(h, q, got, None, [True, True])
    assert torch.equal(quantise(x, q, FORMATS["bf16"], act=act)[0], got[0])


def test_the_same_bits_without_showing_the_activation() -> None:
    for name in ("fp8_tensor.a1", "fp8_block.a1"):
        q, x = QUANTISERS[name], normal(3, 5, 256, dtype=torch.float16)
        act, h = Activation.parse("silu"), torch.empty(5, 128, dtype=torch.float16, device=DEVICE)
        shown, hidden = (quantise(x, q, FORMATS["fp16"], act=act, h_RI=buffer) for buffer in (h, None))

        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(shown, hidden, strict=True))


def test_refusals() -> None:
    x = torch.zeros(2, 96, device=DEVICE)
    with pytest.raises(ContractError, match="groups of 32 do not divide"):
        quantise(x[:, :40], QUANTISERS["mxfp8.a1"], FORMATS["fp32"])
    with pytest.raises(ContractError, match="scale is None"):
        quantise(x, QUANTISERS["fp8_tensor_static.a1"], FORMATS["fp32"])
    with pytest.raises(ContractError, match="dynamic"):
        quantise(x, QUANTISERS["fp8_token.a1"], FORMATS["fp32"], torch.ones(1, 1, device=DEVICE))
    with pytest.raises(ContractError, match="at most 32768"):
        quantise(torch.zeros(1, 32769, device=DEVICE), QUANTISERS["fp8_token.a1"], FORMATS["fp32"])
    with pytest.raises(ContractError, match="pairs of columns"):
        quantise(x[:, :95], QUANTISERS["fp8_token.a1"], FORMATS["fp32"], act=Activation())
