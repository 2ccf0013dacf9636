"""The derived bounds: every order of summation stays within them, and nothing is called exact that is not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moeproof.reference.contract import FORMATS, Claims
from moeproof.reference.oracle.bounds import EXACT_TERMS, U32, accumulator, combine_error, dot_error
from moeproof.reference.oracle.experts import _quantum
from moeproof.reference.oracle.rounding import lowest_bit, round_to

from .arithmetic import ORDERS

Tensor = torch.Tensor
DEFAULT = Claims()
ROWS = 48


def gaussian(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x, w


def same_sign(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    return x.abs(), w.abs()


def wide(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes over 24 binades, so that small terms fall off the end of large sums."""
    return x * 2.0 ** torch.randint(-12, 12, x.shape, generator=torch.Generator().manual_seed(4)), w


def cancelling(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """The second half undoes the first up to its last bits: the sum is far below S."""
    half = x.shape[-1] // 2
    x, w = x.clone(), w.clone()
    x[:, half : 2 * half], w[:, half : 2 * half] = -x[:, :half], w[:, :half] * (1 + 2.0**-7)
    return x, w


def large_first(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """One huge term, then many that are each about half of its last place."""
    x = x.abs() * 2.0**-13
    x[:, 0] = 2.0**11
    return x, w.abs() + 0.5


DATA: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    f.__name__: f for f in (gaussian, same_sign, wide, cancelling)
}


def operands(K: int, data: str, fmt: str) -> tuple[Tensor, Tensor]:
    """x and w (ROWS, K), values of `fmt`, float64."""
    rng = torch.Generator().manual_seed(K)
    x, w = (torch.randn(ROWS, K, dtype=torch.float64, generator=rng) for _ in range(2))
    x, w = (DATA | {"large_first": large_first})[data](x, w)
    return round_to(x, FORMATS[fmt]), round_to(w, FORMATS[fmt])


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("K", [1, 2, 7, 16, 64, 256, 1024, 3072])
def test_float32_sums_of_any_order_stay_within_dot_error(K: int, data: str, fmt: str) -> None:
    x, w = operands(K, data, fmt)
    S, exact = (x * w).abs().sum(-1), (x * w).sum(-1)
    allowed = dot_error(S, exact, K, 0.0, FORMATS[fmt], DEFAULT)
    products = x.float() * w.float()
    got = {name: add(products) for name, add in ORDERS.items()}
    got["torch.matmul"] = (x.float() @ w.float().T).diagonal()
    if fmt != "fp32":
        got["torch.matmul fp32 out"] = torch.bmm(x.float()[:, None], w.float()[:, :, None])[:, 0, 0]
    for name, sums in got.items():
        ratio = ((sums.double() - exact).abs() / allowed).nan_to_num(nan=0.0).max()
        assert float(ratio) <= 1, f"{name}: {float(ratio):.3g} of what is allowed"


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("K", [2, 64, 1024, 3072])
def test_the_oracles_own_error_is_in_the_bound(K: int, data: str) -> None:
    """float64 sums against exactly rounded ones: at most K 2^-53 S off, and every bound has that much to spare for it."""
    x, w = operands(K, data, "bf16")
    products = x * w  # exact: 16 bits of mantissa
    S, exact = products.abs().sum(-1), torch.tensor([math.fsum(row) for row in products.tolist()], dtype=torch.float64)
    own = K * 2.0**-53 * S
    for oracle in (products.sum(-1), (x @ w.T).diagonal()):
        assert bool(((oracle - exact).abs() <= own).all())
    without = accumulator(K, FORMATS["bf16"], DEFAULT) * S + 6 * U32 * exact.abs()
    assert bool((dot_error(S, exact, K, 0.0, FORMATS["bf16"], DEFAULT) >= without + own * (1 - 1e-6)).all())


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("K", [256, 3072])
def test_the_known_limit_of_a_statistical_bound(K: int, fmt: str) -> None:
    """A huge first term makes every later rounding go the same way: a sequential float32 sum is then off by up to K units,
    which the bound (2 sqrt(K) for float32, K/6.4 for 16 bits) does not grant. No recipe draws such data; blocked orders
    pass."""
    x, w = operands(K, "large_first", fmt)
    exact = (x * w).sum(-1)
    products = x.float() * w.float()
    allowed = dot_error(exact, exact, K, 0.0, FORMATS[fmt], DEFAULT)
    error = {name: (add(products).double() - exact).abs() for name, add in ORDERS.items()}

    assert bool((error["sequential"] > allowed).any())
    assert bool((error["sequential"] <= K * U32 * exact).all())
    for name in ("pairwise", "blocks of 32", "reversed"):
        assert bool((error[name] <= allowed).all()), name


@pytest.mark.parametrize("fmt", ["bf16", "fp16"])
@pytest.mark.parametrize("K", [16, 256, 3072])
def test_the_cpu_16_bit_matmul_stays_within_dot_error_and_one_rounding(K: int, fmt: str) -> None:
    x, w = operands(K, "gaussian", fmt)
    form = FORMATS[fmt]
    got = (x.to(form.dtype) @ w.to(form.dtype).T).double()
    exact, S = x @ w.T, x.abs() @ w.abs().T
    error = dot_error(S, exact, K, 0.0, form, DEFAULT)
    half_step = 2.0 ** (torch.floor(torch.log2(exact.abs() + error)) - form.bits - 1)

    assert bool(((got - exact).abs() <= error + half_step).all())


@pytest.mark.parametrize("K", [64, 1024])
def test_the_bound_is_not_a_hundred_times_too_loose(K: int) -> None:
    """float32 operands, sequential sum of one sign: the bound must be near enough to reject a bf16 accumulator."""
    x, w = operands(K, "same_sign", "fp32")
    S = (x * w).sum(-1)
    allowed = dot_error(S, S, K, 0.0, FORMATS["fp32"], DEFAULT)
    seen = (ORDERS["sequential"](x.float() * w.float()).double() - S).abs()
    rounded = torch.zeros(ROWS, dtype=torch.bfloat16)
    for column in (x * w).float().unbind(-1):
        rounded = (rounded.float() + column).bfloat16()

    assert float((seen / allowed).max()) > 0.01
    assert bool(((rounded.double() - S).abs() > allowed).any())


def test_accumulator_as_derived() -> None:
    fp32, bf16, fp16 = FORMATS["fp32"], FORMATS["bf16"], FORMATS["fp16"]
    # float32: 2 sqrt(K) + 8 units, never more than one unit a term.
    assert [accumulator(K, fp32, DEFAULT) / U32 for K in (1, 4, 8, 64, 4096)] == [1, 4, 8, 24, 136]
    # 16-bit: 2.5 units per step of 16, and 8; doubling K doubles the first part only.
    for fmt in (bf16, fp16):
        assert [accumulator(K, fmt, DEFAULT) / U32 for K in (16, 512, 1024, 2048, 7168)] == [10.5, 88, 168, 328, 1128]
    for K in (16, 256, 4096):
        step = [accumulator(n * K, bf16, DEFAULT) - 8 * U32 for n in (1, 2)]
        assert step[1] == 2 * step[0]
        root = [accumulator(n * K, fp32, DEFAULT) - 8 * U32 for n in (1, 4)]
        assert K <= 64 or root[1] == pytest.approx(2 * root[0])


def test_the_h100_stays_within_the_accumulator_bound() -> None:
    """The committed measurement, product by product: within the bound, and the bound within ten times of the worst."""
    record = json.loads((Path(__file__).parents[2] / "docs/results/accumulators-h100.json").read_text())
    rows = [r for r in record["rows"] if r["operands"] != "fp8" and "tf32" not in r["product"]]
    ratios = {}
    for r in rows:
        allowed = accumulator(r["K"], FORMATS[r["operands"]], DEFAULT)
        ratios[r["operands"], r["K"], r["data"], r["product"]] = r["worst_over_uS"] * U32 / allowed

    assert len(ratios) >= 60
    assert max(ratios.values()) <= 1, max(ratios, key=lambda k: ratios[k])
    for name in ("fp32", "bf16", "fp16"):
        assert max(v for k, v in ratios.items() if k[0] == name) > 0.1


def test_weaker_claims_widen_as_stated() -> None:
    fp32, bf16, fp16 = FORMATS["fp32"], FORMATS["bf16"], FORMATS["fp16"]
    tf32, dtype = Claims(accumulate="tf32"), Claims(accumulate="dtype")

    assert accumulator(64, fp32, tf32) == accumulator(64, fp32, DEFAULT) + 2.0**-9
    assert accumulator(64, bf16, tf32) == accumulator(64, bf16, DEFAULT)  # 8 bits fit into tf32's 11
    assert accumulator(64, bf16, dtype) == 64 * 2.0**-8
    assert accumulator(64, fp16, dtype) == 64 * 2.0**-11
    for fmt in (fp32, bf16, fp16):
        for K in (1, 2, 16, 4096):
            for claim in (tf32, dtype):
                assert accumulator(K, fmt, claim) >= (
                    K * U32 if fmt is fp32 and claim is dtype else accumulator(K, fmt, DEFAULT)
                )


def test_tf32_and_dtype_arithmetic_need_and_get_their_claims() -> None:
    K = 256
    x, w = operands(K, "same_sign", "fp32")
    S = (x * w).sum(-1)
    mask = ~((1 << 13) - 1)
    cut = [(t.float().view(torch.int32) & mask).view(torch.float32) for t in (x, w)]
    tf32 = (cut[0] * cut[1]).sum(-1).double()
    x16, w16 = operands(K, "same_sign", "bf16")
    S16 = (x16 * w16).sum(-1)
    dtype = torch.zeros(ROWS, dtype=torch.bfloat16)
    for a, b in zip(x16.unbind(-1), w16.unbind(-1), strict=True):
        dtype = (dtype.float() + (a * b).float()).bfloat16()
    for got, want, fmt, claim in ((tf32, S, "fp32", "tf32"), (dtype.double(), S16, "bf16", "dtype")):
        granted, default = (
            dot_error(want, want, K, 0.0, FORMATS[fmt], Claims(accumulate=c))
            for c in (claim, "fp32")  # type: ignore[arg-type]
        )
        assert bool(((got - want).abs() <= granted).all()), claim
        assert bool(((got - want).abs() > default).any()), claim


# ---- exactness -----------------------------------------------------------------------------------------------------------


def test_integer_sums_are_proved_and_bit_equal_in_every_order() -> None:
    rng = torch.Generator().manual_seed(1)
    x = torch.randint(-30, 31, (ROWS, 512), generator=rng).double() * 2.0**-5
    w = torch.randint(-30, 31, (ROWS, 512), generator=rng).double() * 2.0**3
    S, exact = (x * w).abs().sum(-1), (x * w).sum(-1)
    quantum = lowest_bit(x) * lowest_bit(w)

    assert quantum == 2.0**-2
    assert bool((dot_error(S, exact, 512, quantum, FORMATS["bf16"], DEFAULT) == 0).all())
    for seed in range(20):
        shuffled = torch.randperm(512, generator=torch.Generator().manual_seed(seed))
        products = (x[:, shuffled] * w[:, shuffled]).float()
        for name, add in ORDERS.items():
            assert torch.equal(add(products).double(), exact), name


def test_the_proof_ends_at_two_to_the_24_quanta() -> None:
    S = torch.tensor([EXACT_TERMS, EXACT_TERMS + 1, 2 * EXACT_TERMS], dtype=torch.float64)

    assert (dot_error(S, S, 4, 1.0, FORMATS["bf16"], DEFAULT) == 0).tolist() == [True, False, False]
    assert (combine_error(S, 4, 1.0, FORMATS["bf16"], DEFAULT) == 0).tolist() == [True, False, False]
    # 2^24 + 1 is the first integer that float32 cannot hold, so the limit is sharp.
    assert torch.tensor(EXACT_TERMS + 1, dtype=torch.float64).float().item() != EXACT_TERMS + 1


@pytest.mark.parametrize("claim", ["tf32", "dtype"])
def test_a_weaker_accumulator_is_never_called_exact(claim: str) -> None:
    S = torch.tensor([3.0], dtype=torch.float64)

    assert float(dot_error(S, S, 2, 1.0, FORMATS["bf16"], Claims(accumulate=claim))) > 0


def test_a_16_bit_combine_is_never_called_exact() -> None:
    S = torch.tensor([3.0], dtype=torch.float64)

    assert float(combine_error(S, 2, 1.0, FORMATS["bf16"], Claims(combine="dtype"))) == 4 * 2.0**-8 * 3
    assert float(combine_error(S, 2, 1.0, FORMATS["bf16"], DEFAULT)) == 0
    assert float(combine_error(S, 2, 0.0, FORMATS["bf16"], DEFAULT)) == 4 * U32 * 3


@pytest.mark.parametrize("quantum", [0.0, math.nan])
def test_no_quantum_no_proof(quantum: float) -> None:
    S = torch.tensor([0.5], dtype=torch.float64)

    assert float(dot_error(S, S, 2, quantum, FORMATS["bf16"], DEFAULT)) > 0
    assert float(combine_error(S, 2, quantum, FORMATS["bf16"], DEFAULT)) > 0


def test_products_below_float32_are_not_proved_exact() -> None:
    """2^-80 * 2^-80 is exact in theory and 0 in float32: halves of the least subnormal vanish one by one."""
    x = torch.full((1, 4), 2.0**-75, dtype=torch.float64)
    S = (x * x).sum(-1)
    quantum = lowest_bit(x) ** 2
    got = ORDERS["sequential"](x.float() * x.float())

    assert float(got) == 0 and float(S.float()) == 2.0**-148
    assert bool((dot_error(S, S, 4, quantum, FORMATS["fp32"], DEFAULT) > 0).all())
    assert bool((combine_error(S, 4, quantum, FORMATS["fp32"], DEFAULT) > 0).all())


def test_sums_beyond_float32_are_not_proved_exact() -> None:
    """2^127 + 2^127 - 2^127 overflows on the way, although every number is a multiple of the quantum."""
    terms = torch.tensor([[2.0**127, 2.0**127, -(2.0**127)]], dtype=torch.float64)
    S = terms.abs().sum(-1)

    assert ORDERS["sequential"](terms.float()).isinf().all()
    assert bool((dot_error(S, terms.sum(-1), 3, 2.0**127, FORMATS["bf16"], DEFAULT) > 0).all())
    assert bool((combine_error(S, 3, 2.0**127, FORMATS["bf16"], DEFAULT) > 0).all())


def test_nothing_to_add_is_exact() -> None:
    """All slots dead: every factor is zero, lowest_bit says inf, and the answer must be exactly zero."""
    zero = torch.zeros(3, dtype=torch.float64)

    assert bool((combine_error(zero, 3, math.inf, FORMATS["bf16"], DEFAULT) == 0).all())
    assert bool((dot_error(zero, zero, 3, math.inf, FORMATS["bf16"], DEFAULT) == 0).all())


def test_the_sampled_quantum_is_the_whole_one_or_gives_up() -> None:
    """_quantum looks at a few rows first: it may say 0 (no proof), never more than the true common divisor."""
    rng = torch.Generator().manual_seed(3)
    for seed in range(40):
        x = torch.randint(-8, 9, (40, 6), generator=rng).double()
        w = torch.randint(-8, 9, (30, 6), generator=rng).double()
        if seed % 2:
            x[35, 2] = 2.0**-30  # beyond the sample
        if seed % 3 == 0:
            w[29] = 0.1
        if seed % 5 == 0:
            x[:16] = 0
        true = lowest_bit(x) * lowest_bit(w)
        assert _quantum(x, w, x.abs() @ w.abs().T) in (true, 0.0)
