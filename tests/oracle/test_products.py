"""Products of codes: the bound of each accumulator holds for a simulation of it, and a stronger claim's bound does not."""

from __future__ import annotations

import pytest
import torch

from moeproof.reference.contract import FORMATS, Claims
from moeproof.reference.contract.tensor_cores import TENSOR_CORES, claim_on
from moeproof.reference.oracle.codes import round_values
from moeproof.reference.oracle.products import ACCUMULATIONS, Operand, accumulator_class, product
from moeproof.reference.oracle.rounding import exponent_of, power_of_two

Tensor = torch.Tensor
BF16, E4M3, INT8 = FORMATS["bf16"], FORMATS["e4m3fn"], FORMATS["int8"]


def truncating(x: Tensor, w: Tensor, fraction: int, step: int, promote: int = 0) -> Tensor:
    """A tensor core: each step aligned to its largest exponent, cut below `fraction` bits toward zero, then added."""
    total = torch.zeros(x.shape[0], w.shape[0], dtype=torch.float64)
    part = torch.zeros_like(total)
    for start in range(0, x.shape[1], step):
        terms = x[:, None, start : start + step] * w[None, :, start : start + step]
        every = torch.cat([part[..., None], terms], dim=-1)
        quantum = power_of_two(exponent_of(every.abs().amax(dim=-1, keepdim=True)).clamp(min=-900) - fraction)
        part = (torch.trunc(every / quantum) * quantum).sum(dim=-1)
        if promote and (start + step) % promote == 0:
            total, part = (total + part).float().double(), torch.zeros_like(part)
    return (total + part).float().double()


def _codes(rows: int, columns: int, seed: int, same_sign: bool) -> Tensor:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double() * 60
    return round_values(values.abs() if same_sign else values, E4M3)


@pytest.mark.parametrize("same_sign", [False, True])
@pytest.mark.parametrize("columns", [128, 512, 2048])
@pytest.mark.parametrize("claim", ["fp8_promoted", "fp8_unpromoted"])
def test_the_bound_of_an_fp8_claim_holds_for_its_tensor_core(claim: str, columns: int, same_sign: bool) -> None:
    x, w = _codes(8, columns, 1, same_sign), _codes(16, columns, 2, same_sign)
    got = truncating(x, w, 13, 32, 128 if claim == "fp8_promoted" else 0)
    exact, error = product(Operand(x, E4M3), Operand(w, E4M3), BF16, Claims(accumulate=claim))

    assert bool(((got - exact).abs() <= error).all())
    # Of random signs the worst of 128 sums is 3 standard deviations off where 7 are allowed.
    assert float(((got - exact).abs() / error).max()) > (0.2 if same_sign else 0.06)


@pytest.mark.parametrize("columns", [128, 512])
def test_promoted_sums_keep_their_bound_whatever_the_values_are_like(columns: int) -> None:
    """Values of one size have partial sums far above their largest product; outliers set the quantum for all others."""
    g = torch.Generator().manual_seed(7)
    x, w = (torch.rand(rows, columns, generator=g).double() * 2 - 1 for rows in (64, 96))
    for values in (x, torch.where(torch.rand(x.shape, generator=g) < 1 / 256, x * 32, x)):
        a, b = round_values(values * 14, E4M3), round_values(w * 448, E4M3)
        exact, error = product(Operand(a, E4M3), Operand(b, E4M3), BF16, Claims(accumulate="fp8_promoted"))
        ratio = (truncating(a, b, 13, 32, 128) - exact).abs() / error

        assert 0.1 < float(ratio.max()) <= 1


def test_unpromoted_sums_break_the_bound_of_those_who_claim_promotion_or_float32() -> None:
    x, w = _codes(8, 2048, 3, True), _codes(16, 2048, 4, True)
    got = truncating(x, w, 13, 32)
    for claim in ("fp32", "fp8_promoted"):
        exact, error = product(Operand(x, E4M3), Operand(w, E4M3), BF16, Claims(accumulate=claim))
        assert bool(((got - exact).abs() > error).any()), claim


def test_int8_sums_are_exact_whatever_is_claimed() -> None:
    g = torch.Generator().manual_seed(5)
    x, w = (torch.randint(-127, 128, (4, 4096), generator=g).double() for _ in range(2))
    _, error = product(Operand(x, INT8), Operand(w, INT8), BF16, Claims(accumulate="fp8_promoted"))
    exact = x @ w.T

    # Only the scales' roundings are allowed, relative to the result.
    assert bool((error <= 8 * 2.0**-24 * exact.abs() + 4096 * 2.0**-53 * (x.abs() @ w.abs().T)).all())


def test_the_claim_applies_to_operands_that_an_fp8_core_takes() -> None:
    promoted = Claims(accumulate="fp8_promoted")

    assert accumulator_class(E4M3, FORMATS["int4"], promoted) == "fp8_promoted"  # int4 is exact in e4m3
    assert accumulator_class(BF16, FORMATS["e2m1"], promoted) == "fp32"
    assert accumulator_class(INT8, INT8, promoted) == "int32"
    assert set(ACCUMULATIONS) == {"fp32", "tf32", "dtype", "int32", "fp8_promoted", "fp8_unpromoted"}


def test_decoding_through_the_dtype_is_a_claim_of_its_own() -> None:
    """(q - z) * s rounded to bf16 before the product: outside the default's bound, and exact operands under the claim."""
    q = torch.arange(-8, 8).double().repeat(4)[None]
    w = Operand(q * float(torch.tensor(0.0173).bfloat16()), FORMATS["int4"], 32)
    # One code only: the rounding errors of several would cancel.
    x = Operand((q == 5).double(), BF16, quantised=False)
    rounded = x.values @ w.values.float().bfloat16().double().T
    for claims, inside in ((Claims(), False), (Claims(decode="dtype"), True)):
        exact, error = product(x, w, BF16, claims)
        assert bool((rounded - exact).abs() <= error) is inside


def _scaled(rows: int, seed: int, exponents: list[int]) -> Operand:
    """e4m3 codes in four groups of 32, each with a scale of one of these binades."""
    g = torch.Generator().manual_seed(seed)
    codes = round_values(torch.randn(rows, 128, generator=g).double() * 100, E4M3)
    scales = power_of_two(torch.tensor(exponents)[torch.randint(len(exponents), (rows, 4), generator=g)])
    return Operand(codes * scales.repeat_interleave(32, dim=1), E4M3, 32, True, codes, scales)


ORDERS = {
    "left": lambda p, a, b: (p * a) * b,
    "right": lambda p, a, b: (p * b) * a,
    "scales first": lambda p, a, b: p * (a * b),
}


@pytest.mark.parametrize("order", [*ORDERS, "decoded"])
def test_every_order_of_scaling_keeps_its_bound_where_it_has_one(order: str) -> None:
    """Scales near the ends of e8m0: float32 makes infinities and NaN of sums that float64 finds small, and only there."""
    x, w = _scaled(16, 1, [118, 60, 40, 20, 0, -60]), _scaled(16, 2, [115, 20, 0, -20, -60, -115])
    assert x.codes is not None and w.codes is not None and x.scales is not None and w.scales is not None
    exact, error = product(x, w, BF16, Claims())
    got = torch.zeros(16, 16)
    for group in range(4):
        columns = slice(32 * group, 32 * group + 32)
        if order == "decoded":
            got += x.values[:, columns].float() @ w.values[:, columns].float().T
        else:
            partial = (x.codes[:, columns] @ w.codes[:, columns].T).float()
            got += ORDERS[order](partial, x.scales[:, group, None].float(), w.scales[None, :, group].float())

    inside = error.isfinite()
    assert bool(((got.double() - exact).abs() <= error)[inside].all())
    assert bool(inside.any()) and bool((~inside).any()) and not bool(got[~inside].isfinite().all())


def test_sums_far_inside_float32_always_have_a_bound() -> None:
    x, w = _scaled(6, 3, [40, 20, -60, 0]), _scaled(7, 4, [40, -20, 60, 0])

    assert bool(product(x, w, BF16, Claims())[1].isfinite().all())


def test_claims_of_architectures_are_claims() -> None:
    assert all(Claims(accumulate=core.claim) for core in TENSOR_CORES)
    assert claim_on("sm_90", "fp8") == "fp8_unpromoted"
    assert claim_on("sm_90", "fp8", promoted=True) == "fp8_promoted"
    assert claim_on("sm_90", "bf16", promoted=True) == "fp32"
