"""Every activation: its values against scalar code, its bound against plain float32 over every 16-bit gate."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch

from moeproof.reference.contract import ACTIVATIONS, FORMATS, Activation, Claims
from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle import activate, activations
from moeproof.reference.oracle.activations import exact, split

from . import arithmetic, scalar

Tensor = torch.Tensor
TEXTS = (
    "silu",
    "silu:limit=1",
    "silu:limit=7",
    "silu:interleaved",
    "gelu",
    "gelu:interleaved",
    "gelu_tanh",
    "swigluoai",
    "swigluoai:packed",
    "swigluoai:alpha=1.1:beta=0.5:limit=3",
    "swigluoai_uninterleave:limit=7",
    "swigluoai_uninterleave:limit=7:beta=0",
    "swiglustep",
    "swiglustep:limit=1",
    "situ:beta=4",
    "situ:beta=4:linear_beta=25",
    "situ:beta=0.5:linear_beta=2",
    "silu_no_mul",
    "gelu_no_mul",
    "gelu_tanh_no_mul",
    "relu_no_mul",
    "relu2_no_mul",
)
ACTS = {text: Activation.parse(text) for text in TEXTS}
DISTINCT = tuple(t for t in TEXTS if "interleaved" not in t and "packed" not in t and t != "silu:limit=7")
"""Without those that differ in the packing only: the arithmetic of the bound is the same."""
UPS = {"bf16": (1.0, -0.71875, 5.3125), "fp16": (1.0, -0.7158203125, 5.296875)}
SATURATING = ("silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul")


def test_the_list_covers_the_vocabulary() -> None:
    assert {act.name for act in ACTS.values()} == set(ACTIVATIONS)


@cache
def gates(name: str) -> Tensor:
    """Every finite value of a 16-bit format."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(FORMATS[name].dtype)
    return every[every.isfinite()]


def all_pairs(name: str, act: Activation) -> tuple[Tensor, Tensor]:
    """(gates, ups): every finite gate with three ups; ungated, every gate once."""
    g = gates(name)
    ups = torch.tensor(UPS[name] if act.gated else (1.0,), dtype=g.dtype)
    return g.repeat(len(ups)), ups.repeat_interleave(len(g))


def close(got: list[float], want: list[float]) -> bool:
    """Within 1e-12: relative, or of what a tanh or sigmoid loses where it is tiny. Saturated gates may be cut to 0."""
    return all(math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-50) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("text", TEXTS)
def test_values_agree_with_scalar_code(text: str) -> None:
    act = ACTS[text]
    rng = torch.Generator().manual_seed(5)
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 7.0, -7.0, 7.5, -7.5, 31.5, 32, 100, -100, -127.5, -200, 300, 1e-8, -1e-30])
    g = torch.cat([edges, torch.randn(300, generator=rng) * 4, torch.randn(100, generator=rng) * 40]).double()
    u = torch.randn(g.shape, generator=rng, dtype=torch.float64) * 5
    u[: len(edges)] = edges.flip(0)
    rows = arithmetic.packed(g[:, None], u[:, None], act)
    want = [scalar.activated(row, act)[0] for row in rows.tolist()]

    assert close(exact(rows, act)[:, 0].tolist(), want)


@pytest.mark.parametrize("text", TEXTS)
def test_a_row_of_several_columns_is_read_in_its_packing(text: str) -> None:
    act = ACTS[text]
    rows = torch.randn(4, act.width_in(5), generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3
    got = exact(rows, act)

    assert got.shape == (4, 5)
    for row, values in zip(rows.tolist(), got.tolist(), strict=True):
        assert close(values, scalar.activated(row, act))


def test_split_and_pack_are_inverse() -> None:
    g, u = torch.arange(6.0).view(2, 3), -torch.arange(6.0).view(2, 3)
    for text in ("silu", "silu:interleaved"):
        back = split(arithmetic.packed(g, u, ACTS[text]), ACTS[text])
        assert torch.equal(back[0], g) and torch.equal(back[1], u)


def worst(act: Activation, g: Tensor, u: Tensor, out: Format, claims: Claims) -> tuple[float, str]:
    """Largest observed/allowed over all float32 forms of the activation, stored once in `out`."""
    want = activate(arithmetic.packed(g[:, None], u[:, None], act), act, out, claims)
    found = (0.0, "")
    for name, form in arithmetic.forms(act).items():
        got = arithmetic.activated(g.float()[:, None], u.float()[:, None], act, form).to(out.dtype)
        ratios = arithmetic.ratio(got, want)
        at = int(ratios.argmax())
        where = f"{name}: g={float(g[at])!r} u={float(u[at])!r} got {float(got[at])!r}, want {float(want.value[at])!r}"
        found = max(found, (float(ratios[at]), where))
    return found


@pytest.mark.parametrize("out", ["same", "fp32"])
@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("text", DISTINCT)
def test_float32_stays_within_the_bound_for_every_gate(
    text: str, name: str, out: str, record_property: pytest.RecordProperty
) -> None:
    """Exhaustive over gates; and the bound is no more than 100 times what was seen, or it would say nothing."""
    act = ACTS[text]
    g, u = all_pairs(name, act)
    most, where = worst(act, g, u, FORMATS[name if out == "same" else "fp32"], Claims())
    record_property("worst ratio", most)

    assert most <= 1, where
    if not act.name.startswith("relu"):  # exact, or as good as: the square of an fp16 has 22 bits
        assert most > (0.01 if out == "fp32" else 0.5), f"the bound is {1 / most:g} times what float32 needs"


@pytest.mark.parametrize("text", DISTINCT)
def test_float32_stays_within_the_bound_for_float32_gates(text: str) -> None:
    act = ACTS[text]
    rng = torch.Generator().manual_seed(8)
    size = 60_000
    g = torch.randn(size, generator=rng) * 2.0 ** torch.randint(-20, 8, (size,), generator=rng)
    u = torch.randn(size, generator=rng) * 2.0 ** torch.randint(-20, 8, (size,), generator=rng)
    most, where = worst(act, g, u, FORMATS["fp32"], Claims())

    assert most <= 1, where


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("text", [t for t in DISTINCT if not t.startswith(("situ", "gelu"))])
def test_rounding_every_operation_is_within_the_claim(text: str, name: str) -> None:
    """activation=dtype: torch's own 16-bit operations, each of which rounds; and the default claim must refuse some."""
    act = ACTS[text]
    g, u = all_pairs(name, act)
    rows = arithmetic.packed(g[:, None], u[:, None], act)
    form = torch.sigmoid if act.name.startswith("swigluoai") else next(iter(arithmetic.forms(act).values()))
    got = arithmetic.activated(g[:, None], u[:, None], act, form)
    granted = arithmetic.ratio(got, activate(rows, act, FORMATS[name], Claims(activation="dtype")))
    at = int(granted.argmax())

    assert float(granted[at]) <= 1, f"g={float(g[at])!r} u={float(u[at])!r} got {float(got[at])!r}"
    if act.gated:
        assert float(arithmetic.ratio(got, activate(rows, act, FORMATS[name], Claims())).max()) > 1


@pytest.mark.parametrize("text", DISTINCT)
def test_the_approx_claim_adds_exactly_its_relative_error(text: str) -> None:
    act, fmt = ACTS[text], FORMATS["bf16"]
    g, u = (t[::7, None].double() for t in all_pairs("bf16", act))
    rows = arithmetic.packed(g, u, act)
    value = exact(rows, act)
    plain, approx = (activations.error(rows, value, act, fmt, Claims(activation=c)) for c in ("exact", "approx"))
    extra = 0.0 if act.name.startswith("relu") else 2.0**-11 * value.abs()

    assert torch.allclose(approx, torch.where(plain == 0, 0.0, plain + extra), rtol=1e-12, atol=0)


@pytest.mark.parametrize("text", SATURATING)
@pytest.mark.parametrize("out", ["bf16", "fp16", "fp32"])
def test_saturated_gates_are_exact_in_every_form(text: str, out: str) -> None:
    """silu and both gelus of 0, whole numbers >= 32 and <= -128 are 0, g and 0, bit for bit, and so are they times u."""
    act = ACTS[text]
    whole = torch.cat([torch.zeros(1), torch.arange(32.0, 2048.0), -torch.arange(128.0, 2048.0)])
    fmt = FORMATS[out]
    ups = torch.tensor([1.0, -1.0, 3.0, 6.0, -4095.0, 0.0]) if act.gated else torch.ones(1)
    g, u = whole.repeat(len(ups))[:, None], ups.repeat_interleave(len(whole))[:, None]
    value = activate(arithmetic.packed(g, u, act), act, fmt, Claims())

    assert bool((value.bound == 0).all())
    assert torch.equal(exact(arithmetic.packed(g, u, act).double(), act), g.double().clamp(min=0) * u.double() + 0.0)
    for name, form in arithmetic.forms(act).items():
        got = arithmetic.activated(g, u, act, form)
        assert torch.equal(got, g.clamp(min=0) * u), name
        assert bool((got.to(fmt.dtype).double() == value.value).all()), name


def test_a_tie_after_a_saturated_gate_goes_to_even() -> None:
    """35 * 9 = 315 lies between 314 and 316 in bf16. float64's silu(35) = 35 - 2e-14 must not pull it below the tie."""
    for text in ("silu", "gelu", "gelu_tanh"):
        value = activate(torch.tensor([[35.0, 9.0]]), ACTS[text], FORMATS["bf16"], Claims())
        assert (float(value.value), float(value.bound)) == (316.0, 0.0)


@pytest.mark.parametrize(
    ("text", "g", "u"),
    [
        ("silu", 31.0, 1.0),  # exp(-31) still shows in the 24th bit
        ("silu", 32.5, 1.0),
        ("silu", -127.0, 1.0),
        ("silu", 2048.0, 1.0),
        ("silu", 64.0, 4096.0),
        ("silu", 64.0, 0.5),
        ("silu:limit=7", 128.0, 1.0),
        ("swigluoai", 128.0, 1.0),
        ("swiglustep", 128.0, 1.0),
        ("situ:beta=4", 128.0, 1.0),
    ],
)
def test_nothing_else_is_claimed_exact(text: str, g: float, u: float) -> None:
    act = ACTS[text]
    value = activate(arithmetic.packed(torch.tensor([[g]]), torch.tensor([[u]]), act), act, FORMATS["fp32"], Claims())

    assert float(value.bound) > 0


def test_relu_is_exact() -> None:
    act = ACTS["relu_no_mul"]
    value = activate(gates("bf16")[:, None], act, FORMATS["bf16"], Claims())

    assert bool((value.bound == 0).all())
    assert torch.equal(value.value, gates("bf16")[:, None].double().clamp(min=0))


@pytest.mark.parametrize("text", TEXTS)
def test_no_tokens_and_a_single_column(text: str) -> None:
    act = ACTS[text]
    none = activate(torch.empty(0, 3, act.width_in(2)), act, FORMATS["bf16"], Claims())
    one = activate(torch.ones(1, act.width_in(1)), act, FORMATS["bf16"], Claims())

    assert none.value.shape == (0, 3, 2) and none.bound.shape == (0, 3, 2)
    assert one.value.shape == (1, 1)
    assert none.fmt is FORMATS["bf16"]


@pytest.mark.parametrize("text", TEXTS)
def test_nan_stays_nan(text: str) -> None:
    """A NaN pre-activation must not become a number that something could be judged by."""
    act = ACTS[text]
    x = torch.full((1, act.width_in(1)), math.nan, dtype=torch.float64)

    assert bool(activations.exact(x, act).isnan().all())
