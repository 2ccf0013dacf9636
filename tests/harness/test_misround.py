"""The misrounding count: healthy results stay below it, a systematic push across boundaries does not."""

from __future__ import annotations

import pytest
import torch

from moeproof.harness.judging.misround import allowance, chance, misrounded
from moeproof.reference.contract.schemes import FORMATS
from moeproof.reference.oracle.rounding import round_to, ulp
from moeproof.reference.oracle.value import stored

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
