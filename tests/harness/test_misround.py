"""The misrounding count: healthy results stay below it, a systematic push across boundaries does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeproof.harness.judging.misround import allowance, chance, misrounded
from moeproof.reference.contract import FORMATS, Claims, Format
from moeproof.reference.oracle import typical
from moeproof.reference.oracle.products import Operand, product
from moeproof.reference.oracle.rounding import round_to, ulp
from moeproof.reference.oracle.value import Value, stored

BF16, FP16 = FORMATS["bf16"], FORMATS["fp16"]


def exact(rows: int = 64, columns: int = 96, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fmt", [BF16, FP16], ids=lambda f: f.name)
@pytest.mark.parametrize("share", [0.001, 0.03, 0.3])
def test_errors_within_the_bound_do_not_alarm(fmt: object, share: float) -> None:
    """Errors of the largest size, of either sign, and all of one sign as truncating accumulators have them."""
    value = exact()
    error = share * ulp(value, fmt)  # type: ignore[arg-type]
    for sign in (torch.where(exact(seed=1) > 0, 1.0, -1.0), -value.sign(), value.sign()):
        got = round_to(value + sign * error, fmt)  # type: ignore[arg-type]
        assert misrounded("y", got, stored(value, error, fmt), fmt) == []  # type: ignore[arg-type]


def test_a_push_across_boundaries_adds_up() -> None:
    """Results near a boundary, all to the wrong side: each within its bound, together beyond chance."""
    value = exact()
    step = ulp(value, BF16)
    error = 0.02 * step
    beside = (torch.floor(value / step) + 0.5) * step
    close = exact(seed=2) > 0.5
    value = torch.where(close, beside + 0.01 * step, value)
    got = round_to(torch.where(close, value - error, value), BF16)
    want = stored(value, error, BF16)
    assert want.bound is not None

    assert bool(((got - value).abs() <= want.bound).all()), "no bound is broken"
    (found,) = misrounded("y", got, want, BF16)
    assert "are not the exact result's own rounding" in found.message
    assert "toward zero" in found.message


def test_one_row_and_sixteen_columns_are_seen() -> None:
    value = exact(64, 96)
    step = ulp(value, BF16)
    error = 0.02 * step
    for where, words in (((5, slice(None)), "in token 5"), ((slice(None), slice(32, 48)), "in 16 columns from 32")):
        pushed = value.clone()
        pushed[where] = ((torch.floor(value / step) + 0.5) * step + 0.01 * step)[where]
        got = round_to(pushed, BF16)
        got[where] = round_to(pushed - error, BF16)[where]
        found = misrounded("out", got, stored(pushed, error, BF16), BF16)
        assert found, words


def test_ties_may_go_either_way() -> None:
    value = torch.full((8, 32), 1.0 + 2.0**-8, dtype=torch.float64)
    step = ulp(value, BF16)
    assert bool((chance(value, 0 * value, step) == 1).all())
    up = torch.full_like(value, 1.0 + 2.0**-7)
    assert misrounded("y", up, stored(value, 1e-9 + 0 * value, BF16), BF16) == []


def test_the_allowance_is_six_sigma() -> None:
    assert allowance(torch.tensor([0.0, 100.0])).tolist() == [6.0, 166.0]


def _product(claim: str, columns: int, fmt: Format) -> tuple[torch.Tensor, Value]:
    """(what float32 products of this claim give before they are stored, what the judge makes of them)."""
    g = torch.Generator().manual_seed(5)
    operand = FORMATS["e4m3fn"] if claim.startswith("fp8") else fmt
    x, w = (round_to(torch.randn(n, columns, dtype=torch.float64, generator=g), operand) for n in (96, 192))
    a, b = Operand(x, operand), Operand(w, operand)
    value, error = product(a, b, fmt, Claims(accumulate=claim))
    want = replace(stored(value, error, fmt), typical=lambda: typical.product(a, b, fmt, Claims(accumulate=claim)))
    return (x.float() @ w.float().T).double(), want


def _toward_zero(value: torch.Tensor, fmt: Format) -> torch.Tensor:
    return torch.trunc(value / ulp(value, fmt)) * ulp(value, fmt)


def _without_last_bit(value: torch.Tensor, fmt: Format) -> torch.Tensor:
    return round_to(value, replace(fmt, bits=fmt.bits - 1))


def _rounded_twice(value: torch.Tensor, fmt: Format) -> torch.Tensor:
    """With two bits more first: what lies beside a half-way point is put on it, and then goes to even."""
    return round_to(round_to(value, replace(fmt, bits=fmt.bits + 2)), fmt)


@pytest.mark.parametrize(
    ("claim", "columns", "fmt", "store"),
    [
        ("fp32", 2048, FP16, _toward_zero),
        ("fp32", 2048, FP16, _without_last_bit),
        ("fp32", 2048, FP16, _rounded_twice),
        ("fp8_promoted", 512, BF16, _toward_zero),
        ("fp8_promoted", 512, BF16, _without_last_bit),
    ],
)
def test_wrong_stores_that_no_bound_sees_are_counted(
    claim: str, columns: int, fmt: Format, store: Callable[[torch.Tensor, Format], torch.Tensor]
) -> None:
    """A bound of several ulps hides how results are stored; the size that errors have as a rule does not."""
    got, want = _product(claim, columns, fmt)
    assert want.bound is not None and misrounded("y", round_to(got, fmt), want, fmt) == []
    wrong = store(got, fmt)
    # The bound reaches one ulp for the most part: a step more than correct rounding is within it.
    kept = torch.where((wrong - want.value).abs() <= want.bound, wrong, round_to(got, fmt))

    assert float((kept == wrong).double().mean()) > 0.9
    (found,) = misrounded("y", kept, want, fmt)
    assert "are not the exact result's own rounding" in found.message
    assert misrounded("y", kept, replace(want, typical=None), fmt) == [], "the bound expects as many"


def test_sums_that_cancel_to_zero_are_as_uncertain_as_the_oracle() -> None:
    """Integers with scales: the sum is 0, and float64's is what decoding rounded, billions of steps of the stored dtype."""
    g = torch.Generator().manual_seed(3)
    x, w = (torch.randint(-127, 128, (n, 64), generator=g).double() for n in (48, 32))
    x, w = torch.cat([x, x], dim=1), torch.cat([w, -w], dim=1)
    scale = torch.rand(48, 1, generator=g).double()
    a, b = Operand(x * scale, FORMATS["int8"]), Operand(w / 3, FORMATS["int8"])
    value, error = product(a, b, BF16, Claims())
    want = replace(stored(value, error, BF16), typical=lambda: typical.product(a, b, BF16, Claims()))

    assert int((value != 0).sum()) > 100 and float(value.abs().max()) < 1e-8, "not the case this is about"
    assert misrounded("y", torch.zeros_like(value), want, BF16) == []
