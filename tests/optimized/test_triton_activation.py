"""ACT: every name, packing and parameter; one rounding; nothing outside the live rows is read or written."""

from __future__ import annotations

import pytest
import torch
from plain_layer import ACTIVATIONS, DEVICE, DTYPES, local_index, normal, random_ids, strided
from plain_layer import activation as plain

from moeproof.optimized.activation import activate
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import Activation, ContractError

Tensor = torch.Tensor


def check_values(x: Tensor, h: Tensor, act: Activation) -> None:
    """One rounding and a few ulp of float32, more where exp's argument is large; gelu's tail loses what 1 + erf loses."""
    want = plain(x.double(), act)
    g = x.double().abs()
    steep = g.unflatten(-1, (-1, 2)).amax(-1) if act.interleaved else (g[..., : h.shape[-1]] if act.gated else g)
    size = (x.double().abs().amax() + 1) ** 2
    allowed = (12 + 2 * (act.alpha or 1.0) * steep) * 2.0**-24 * want.abs() + torch.finfo(h.dtype).eps / 2 * 1.01 * want.abs()
    if act.name.startswith(("gelu", "situ")):
        allowed += 2.0**-22 * size * (1 + (act.linear_beta or 0.0))
    allowed += 2.0**-25 if h.dtype == torch.float16 else 2.0**-110
    error = (h.double() - want).abs()

    assert bool((error <= allowed).all()), f"worst error / allowed: {float((error / allowed).max())}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", ACTIVATIONS)
def test_values(text: str, dtype: torch.dtype) -> None:
    """Pre-activations far beyond every clamp, on both sides, with a ragged width."""
    act = Activation.parse(text)
    x = normal(1, 33, act.width_in(50), scale=4, dtype=dtype)
    h = torch.full((33, 50), float("nan"), dtype=dtype, device=DEVICE)
    activate(x, h, act)

    check_values(x, h, act)


@pytest.mark.parametrize("text", ["silu", "gelu_tanh", "gelu", "situ:beta=4", "silu_no_mul", "swigluoai:limit=60000"])
def test_every_finite_fp16_gate(text: str) -> None:
    act = Activation.parse(text)
    gate = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    gate = gate[gate.isfinite() & (gate.abs() < 3e4)].to(DEVICE)
    x = gate[:, None] if not act.gated else torch.stack([gate, torch.full_like(gate, 0.75)], dim=1)
    h = torch.empty(len(gate), 1, dtype=torch.float32, device=DEVICE)
    activate(x, h, act)

    assert bool(h.isfinite().all())
    small = gate.abs() < 80
    check_values(x[small], h[small], act)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_a_saturated_gate_is_exact(name: str) -> None:
    gate = torch.tensor([0.0, 32.0, 128.0, 1000.0, -128.0, -1000.0], device=DEVICE)
    h = torch.empty(6, 1, device=DEVICE)
    activate(torch.stack([gate, torch.full_like(gate, 3.0)], dim=1), h, Activation(name))

    assert h.flatten().tolist() == [0.0, 96.0, 384.0, 3000.0, 0.0, 0.0]


@pytest.mark.parametrize("text", ["silu:limit=1", "swigluoai", "swiglustep", "relu_no_mul"])
def test_nan_passes_through_clamps(text: str) -> None:
    act = Activation.parse(text)
    x = normal(2, 3, act.width_in(4))
    x[1] = float("nan")
    h = torch.zeros(3, 4, device=DEVICE)
    activate(x, h, act)

    assert h.isnan().any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("I", [1, 16, 50, 1408])
def test_widths_and_strides(I: int) -> None:  # noqa: E741  (the project's letter)
    act = Activation("swigluoai")
    x = strided(normal(3, 5, 2 * I))
    h = strided(torch.zeros(5, I, device=DEVICE))
    activate(x, h, act)

    check_values(x, h, act)


def test_dead_slots_are_not_touched() -> None:
    slots = Slots(random_ids(4, 9, 3, 5), 5, 5)
    dead = torch.tensor([e < 0 for row in local_index(slots.ids, 5, None) for e in row], device=DEVICE)
    x = normal(5, 27, 32)
    x[dead] = float("nan")
    h = torch.full((27, 16), 7.0, device=DEVICE)
    activate(x, h, Activation(), slots=slots)

    assert bool((h[dead] == 7).all())
    check_values(x[~dead], h[~dead], Activation())


def test_rows_beyond_the_count_are_not_touched() -> None:
    counts = torch.tensor([3, 0, 5], dtype=torch.int32, device=DEVICE)
    live = (torch.arange(5, device=DEVICE) < counts[:, None]).flatten()
    x = normal(6, 15, 32)
    x[~live] = float("nan")
    h = torch.full((15, 16), 7.0, device=DEVICE)
    activate(x, h, Activation(), counts=counts)

    assert bool((h[~live] == 7).all())
    check_values(x[live], h[live], Activation())


def test_refusals_and_empty() -> None:
    with pytest.raises(ContractError, match="needs input"):
        activate(torch.empty(2, 8), torch.empty(2, 8), Activation())
    activate(torch.empty(0, 8), torch.empty(0, 4), Activation())
