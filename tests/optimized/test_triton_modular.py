"""The seed-style pairs: S01-S25 of the contract where they apply to one rank, in both layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_layer import DEVICE, check_close, layer, local_index, normal, random_ids, strided

from moeproof.optimized.modular import (
    TritonBatchedExperts,
    TritonBatchedPrepareFinalize,
    TritonExperts,
    TritonNoEPPrepareFinalize,
)
from moeproof.reference.contract import Activation, ContractError, FusedMoEModularKernel, expert_map, local_experts

Tensor = torch.Tensor
T, H, I, E, K = 13, 40, 24, 5, 3  # noqa: E741  (the project's letters)
LAYOUTS = ("standard", "batched")


def kernel(layout: str, capacity: int = 64, e: int = E, **more: Any) -> FusedMoEModularKernel:
    if layout == "standard":
        return FusedMoEModularKernel(TritonNoEPPrepareFinalize(), TritonExperts(**more))
    return FusedMoEModularKernel(TritonBatchedPrepareFinalize(capacity, e), TritonBatchedExperts(**more))


def weights_of(N: int, dtype: torch.dtype = torch.float32, e: int = E) -> tuple[Tensor, Tensor]:
    return normal(1, e, N, H, dtype=dtype, scale=H**-0.5), normal(2, e, H, I, dtype=dtype, scale=I**-0.5)


def case(dtype: torch.dtype = torch.float32, ids_dtype: torch.dtype = torch.int32) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids and weights; a dead slot's weight is NaN."""
    ids = random_ids(3, T, K, E, ids_dtype)
    return normal(4, T, H, dtype=dtype), ids, torch.where(ids < 0, torch.nan, normal(5, T, K))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer(layout: str, dtype: torch.dtype) -> None:
    """Duplicates, -1 with NaN weights, biases; inputs stay as they were."""
    x, ids, weights = case(dtype, torch.int64)
    w1, w2 = weights_of(2 * I, dtype)
    b1, b2 = normal(6, E, 2 * I, dtype=dtype), normal(7, E, H, dtype=dtype)
    given = [t.clone() for t in (x, ids, weights, w1, w2)]
    out = kernel(layout, b1=b1, b2=b2)(x, w1, w2, weights, ids)

    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(given, (x, ids, weights, w1, w2), strict=True))
    want, magnitude = layer(x, w1, w2, weights, local_index(ids, E, None), Activation(), b1, b2)
    # Rounding h and y to the dtype moves the sum by their unit.
    check_close(out, want, magnitude, roundings=48 + 3 * torch.finfo(dtype).eps * 2.0**24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_and_transposed_arguments(layout: str) -> None:
    x, ids, weights = case()
    w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in weights_of(2 * I))
    out = kernel(layout)(strided(x), w1, strided(w2), strided(weights), strided(ids, 3))
    want, magnitude = layer(x, w1, w2, weights, local_index(ids, E, None), Activation())

    check_close(out, want, magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("text", ["gelu_tanh", "swigluoai", "relu2_no_mul", "silu:limit=1"])
def test_activation_by_string_and_by_constructor(text: str, layout: str) -> None:
    act = Activation.parse(text)
    x, ids, weights = case()
    w1, w2 = weights_of(act.width_in(I))
    by_string = kernel(layout)(x, w1, w2, weights, ids, activation=text)
    by_name = kernel(layout, act=act)(x, w1, w2, weights, ids, activation=act.name)
    want, magnitude = layer(x, w1, w2, weights, local_index(ids, E, None), act)

    check_close(by_string, want, magnitude)
    assert torch.equal(by_string, by_name)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_ranks_sum_to_the_whole(layout: str, placement: str) -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    total = torch.zeros(T, H, dtype=torch.float64, device=DEVICE)
    for rank in range(3):
        here = local_experts(E, 3, rank, placement)
        mapping = expert_map(E, 3, rank, placement)
        assert mapping is not None
        run = kernel(layout, e=len(here))
        total += run(x, w1[here], w2[here], weights, ids, global_num_experts=E, expert_map=mapping.to(DEVICE)).double()
    want, magnitude = layer(x, w1, w2, weights, local_index(ids, E, None), Activation())

    check_close(total.float(), want, magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weight_on_input(layout: str) -> None:
    """Once, before GEMM1, and not again on the output; `a1` is not changed."""
    x, ids, weights = case()
    ids, weights, (w1, w2) = ids[:, :1], weights[:, :1], weights_of(2 * I)
    before = x.clone()
    out = kernel(layout)(x, w1, w2, weights, ids, apply_router_weight_on_input=True)
    want, magnitude = layer(torch.where(ids < 0, 0.0, x * weights), w1, w2, None, local_index(ids, E, None), Activation())

    assert torch.equal(x, before)
    check_close(out, want, magnitude)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inplace(layout: str) -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    want = kernel(layout)(x, w1, w2, weights, ids)
    out = kernel(layout)(x, w1, w2, weights, ids, inplace=True)

    assert out is x
    assert torch.equal(out, want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_calls(layout: str) -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    nothing = kernel(layout)(x, w1, w2, weights, torch.full_like(ids, -1))

    assert bool((nothing == 0).all())
    assert kernel(layout)(x[:0], w1, w2, weights[:0], ids[:0]).shape == (0, H)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_call_does_not_see_the_first(layout: str) -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    run = kernel(layout)
    run(x, w1, w2, weights, ids)
    other = (x[3:9].flip(0), w1, w2, weights[3:9].roll(1, 0), ids[3:9].roll(1, 0))

    assert torch.equal(run(*other), kernel(layout)(*other))


def apply(
    experts: Any, a: Tensor, w1: Tensor, w2: Tensor, ids: Tensor, spaces: tuple[Tensor, Tensor], counts: Tensor | None
) -> Tensor:
    return experts.apply(a, w1, w2, ids, "silu", E, None, *[None] * 6, *spaces, counts)


@pytest.mark.parametrize("poison", [float("nan"), 1e4])
def test_workspaces_are_declared_honestly(poison: float) -> None:
    """Exactly the declared elements are used, whatever they held; rows of dead slots are zeros; h stands in workspace2."""
    x, ids, _ = case()
    w1, w2 = weights_of(2 * I)
    experts = TritonExperts(act=Activation())
    n13, n2, dtype = experts.workspace_shapes(x, x, T, 2 * I, H, K, E)
    guarded = [torch.full((n + 64,), poison, dtype=dtype, device=DEVICE) for n in (n13, n2)]
    y = apply(experts, x, w1, w2, ids, (guarded[0][32:-32], guarded[1][32:-32]), None)

    assert (n13, n2) == (T * K * max(2 * I, H), T * K * I)
    for space in guarded:
        assert all(
            torch.equal(edge, torch.full_like(edge, poison)) or bool(edge.isnan().all()) for edge in (space[:32], space[-32:])
        )
    assert bool((y[ids < 0] == 0).all())
    assert bool(y.isfinite().all())
    assert bool(guarded[1][32:-32].view(T, K, I)[ids >= 0].isfinite().all())


def test_batched_counts_and_rows() -> None:
    """int32 counts of local length; duplicates count twice; each region starts with its rows in slot order."""
    x, ids, weights = case()
    mapping = expert_map(E, 2, 1)
    assert mapping is not None
    prepared = TritonBatchedPrepareFinalize(64, 2).prepare(x, None, None, weights, ids, E, mapping.to(DEVICE), False)
    rows, counts = prepared[0], prepared[2]
    assert counts is not None
    local = local_index(ids, E, mapping)
    tokens = [[t for t, row in enumerate(local) for e in row if e == expert] for expert in range(2)]

    assert counts.tolist() == [len(t) for t in tokens]
    assert counts.dtype == torch.int32
    for expert in range(2):
        assert torch.equal(rows[expert, : len(tokens[expert])], x[tokens[expert]])


def test_overflow_is_refused() -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    hot = torch.full_like(ids, 4)
    assert kernel("batched", capacity=T * K)(x, w1, w2, weights, hot).shape == (T, H)
    with pytest.raises(ContractError, match=r"expert 4 .* gets 39 rows; at most 38"):
        kernel("batched", capacity=T * K - 1)(x, w1, w2, weights, hot)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_refusals(layout: str) -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    scale = torch.ones(1, device=DEVICE)
    with pytest.raises(ContractError, match="a1_scale"):
        kernel(layout)(x, w1, w2, weights, ids, a1_scale=scale)
    with pytest.raises(ContractError, match="w2_scale"):
        kernel(layout)(x, w1, w2, weights, ids, w2_scale=scale)
    with pytest.raises(ContractError, match="one slot"):
        kernel(layout)(x, w1, w2, weights, ids, apply_router_weight_on_input=True)
    with pytest.raises(ContractError, match="not known"):
        kernel(layout)(x, w1, w2, weights, ids, activation="mish")
    with pytest.raises(ContractError, match="made for 'gelu'"):
        kernel(layout, act=Activation("gelu"))(x, w1, w2, weights, ids)
    with pytest.raises(ContractError, match="needs 24 rows"):
        kernel(layout)(x, w1, w2, weights, ids, activation="silu_no_mul")
    with pytest.raises(ContractError, match=r"torch\.int16"):
        kernel(layout)(x, w1, w2, weights, ids.short())


def test_batched_refusals() -> None:
    x, ids, weights = case()
    w1, w2 = weights_of(2 * I)
    limited = TritonBatchedPrepareFinalize(64, E, max_num_tokens=T - 1)
    with pytest.raises(ContractError, match="at most 12"):
        FusedMoEModularKernel(limited, TritonBatchedExperts())(x, w1, w2, weights, ids)
    with pytest.raises(ContractError, match="call prepare first"):
        limited.finalize(x, torch.zeros(E, 64, H, device=DEVICE), weights, ids, False)
    with pytest.raises(ContractError, match="expert_num_tokens is None"):
        apply(TritonBatchedExperts(), x[None].expand(E, T, H), w1, w2, ids, (x.flatten(), x.flatten()), None)
    with pytest.raises(ContractError, match="workspace13 has 520 elements"):
        apply(TritonExperts(), x, w1, w2, ids, (x.flatten(), x.flatten()), None)
