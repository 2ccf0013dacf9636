"""DISPATCH and COMBINE: each live slot once, with its own weight; dead slots contribute exactly 0 whatever they hold."""

from __future__ import annotations

import pytest
import torch
from plain_layer import DEVICE, DTYPES, check_close, local_index, normal, random_ids, strided, weighted_sum

from moeproof.optimized.align import batch_rows
from moeproof.optimized.combine import combine
from moeproof.optimized.dispatch import move_rows, weigh_input
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, ContractError
from moeproof.reference.oracle.rounding import round_to

NAN = float("nan")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "K", "H"), [(1, 1, 16), (9, 3, 100), (33, 12, 40), (5, 8, 1100), (17, 2, 1)])
def test_weighted_sum(T: int, K: int, H: int, dtype: torch.dtype) -> None:
    slots = Slots(random_ids(1, T, K, 5), 5, 5)
    local = local_index(slots.ids, 5, None)
    dead = torch.tensor(local, device=DEVICE) < 0
    y, weights = normal(2, T, K, H, dtype=dtype), normal(3, T, K)
    y[dead], weights[dead] = NAN, NAN
    for weighted in (True, False):
        out = torch.full((T, H), NAN, dtype=dtype, device=DEVICE)
        combine(y.flatten(0, 1), weights, slots, out, weighted=weighted)

        check_close(out, *weighted_sum(y, weights if weighted else None, local))


def test_a_token_without_slots_gives_zeros() -> None:
    slots = Slots(torch.full((4, 3), -1, dtype=torch.int64, device=DEVICE), 5, 5)
    out = torch.full((4, 24), NAN, device=DEVICE)
    combine(torch.full((12, 24), NAN, device=DEVICE), torch.full((4, 3), NAN, device=DEVICE), slots, out)

    assert bool((out == 0).all())


def test_strided() -> None:
    slots = Slots(strided(random_ids(4, 9, 3, 5), 2), 5, 5)
    local = local_index(slots.ids, 5, None)
    y, weights, out = strided(normal(5, 27, 20)), strided(normal(6, 9, 3)), strided(torch.zeros(9, 20, device=DEVICE))
    combine(y, weights, slots, out)

    check_close(out, *weighted_sum(y.view(9, 3, 20), weights, local))


def test_identity_experts_shared_expert_and_scale() -> None:
    """scale * (sum w y + sum w x over identity slots) + sigmoid(gate) * shared; the shared term is not scaled."""
    ids = random_ids(7, 12, 4, 8)
    slots = Slots(ids, 5, 5)  # ids 5, 6 are identity experts, 7 is out of range
    y, weights, x = normal(8, 12, 4, 40), normal(9, 12, 4), normal(10, 12, 40)
    shared, gate = normal(11, 12, 40), normal(12, 12)
    weights[(ids < 0) | (ids == 7)] = NAN
    out = torch.empty(12, 40, device=DEVICE)
    combine(y.flatten(0, 1), weights, slots, out, scale=2.5, zero_experts=2, x_TH=x, shared_TH=shared, gate_T=gate)

    value, magnitude = weighted_sum(y, weights, local_index(ids, 5, None))
    identity = torch.where((ids == 5) | (ids == 6), weights, 0.0).double()
    value, magnitude = value + identity.sum(1)[:, None] * x.double(), magnitude + identity.abs().sum(1)[:, None] * x.abs()
    want = 2.5 * value + torch.sigmoid(gate.double())[:, None] * shared.double()
    check_close(out, want, 2.5 * magnitude + shared.abs())


def test_identity_weight_stays_when_weights_were_on_the_input() -> None:
    ids = torch.tensor([[0], [2], [-1]], dtype=torch.int32, device=DEVICE)
    y, x, out = torch.full((3, 8), 4.0, device=DEVICE), torch.ones(3, 8, device=DEVICE), torch.empty(3, 8, device=DEVICE)
    weights = torch.full((3, 1), 0.5, device=DEVICE)
    combine(y, weights, Slots(ids, 2, 2), out, weighted=False, zero_experts=1, x_TH=x)

    assert out[:, 0].tolist() == [4.0, 0.5, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batched_round_trip(dtype: torch.dtype) -> None:
    """Rows carry their slot's token: what comes back must be the token's own row, once for each live slot."""
    slots = Slots(random_ids(13, 19, 3, 5), 5, 5)
    x = normal(14, 19, 24, dtype=dtype)
    rows, counts = batch_rows(slots, 57)
    buffer = torch.full((5 * 57, 24), NAN, dtype=dtype, device=DEVICE)
    move_rows(strided(x), buffer, 3, rows=rows)
    out = torch.empty_like(x)
    combine(buffer, torch.ones(19, 3, device=DEVICE), slots, out, rows=rows)

    live = torch.tensor(local_index(slots.ids, 5, None)) >= 0
    assert (~buffer.isnan()).all(1).view(5, 57).sum(1).tolist() == counts.tolist()
    assert torch.equal(out, (x.float() * live.sum(1, keepdim=True).to(DEVICE)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_on_input_is_a_float32_product_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    """As the contract has it and the oracle computes it, including products that float32 rounds onto a 16-bit midpoint."""
    x = normal(15, 64, 33, dtype=dtype)
    weights = normal(16, 64, 1)
    # bf16: 1.3e-8 above the middle of two neighbours, on which float32 puts it. From there it goes to even, downwards.
    x[0], weights[0] = 1 + 2.0**-7, 1 + 227598 * 2.0**-23
    before = x.clone()
    got = weigh_input(x, weights)

    assert torch.equal(x, before)
    assert torch.equal(got, (x.float() * weights).to(dtype))
    if dtype == torch.bfloat16:
        once = round_to(x[0].double() * weights[0].double(), FORMATS["bf16"])
        assert not torch.equal(got[0].double(), once), "the case is not one that rounds twice"


def test_refusals() -> None:
    with pytest.raises(ContractError, match="one slot per token"):
        weigh_input(torch.zeros(4, 8), torch.zeros(4, 2))
    with pytest.raises(ContractError, match="expert output"):
        combine(torch.zeros(4, 7), torch.zeros(4, 1), Slots(torch.zeros(4, 1, dtype=torch.int32), 1, 1), torch.zeros(4, 8))
    with pytest.raises(ContractError, match="topk_weights"):
        combine(torch.zeros(4, 8), torch.zeros(4, 2), Slots(torch.zeros(4, 1, dtype=torch.int32), 1, 1), torch.zeros(4, 8))
    with pytest.raises(ContractError, match="must be equal"):
        move_rows(torch.zeros(4, 8), torch.zeros(4, 8).half(), 1)
