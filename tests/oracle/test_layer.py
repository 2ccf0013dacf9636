"""The oracle's tensors against a loop over tokens, slots and numbers (`scalar.Layer`), stage by stage and as a chain."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.reference.contract import Claims, Inputs, Problem, expert_map, local_experts
from moeproof.reference.contract.placement import PLACEMENTS
from moeproof.reference.oracle import activate, chain, combine, gemm1, gemm2, input_rows
from moeproof.reference.oracle.chain import shared_expert
from moeproof.reference.oracle.experts import live_slots, local_ids
from moeproof.reference.oracle.value import Value

from .scalar import Layer, Row, Slots, rounded

Tensor = torch.Tensor
CLAIMS = Claims()
TINY = "T=5,H=8,I=6,E=4,K=2,"

CASES = {
    "plain": TINY + "seed=1",
    "fp16": TINY + "dtype=fp16,seed=2",
    "fp32": TINY + "dtype=fp32,seed=3",
    "one of everything": "T=1,H=1,I=1,E=1,K=1,seed=4",
    "every expert": "T=4,H=3,I=2,E=4,K=4,seed=5",
    "no tokens": "T=0,H=4,I=4,E=4,K=2,expert_bias=1,shared=3,seed=6",
    "some -1": TINY + "routing=minus1,seed=7",
    "all -1": TINY + "routing=none,expert_bias=1,seed=8",
    "duplicates": "T=5,H=8,I=6,E=4,K=6,router=softmax:table,routing=dup,seed=9",
    "bias": TINY + "expert_bias=1,routing=minus1,seed=10",
    "KN storage": TINY + "storage=KN,expert_bias=1,seed=11",
    "strided": TINY + "strided=1,expert_bias=1,shared=4,shared_gate=1,seed=12",
    "weight on input": "T=5,H=8,I=6,E=4,K=1,weight_on_input=1,expert_bias=1,routing=minus1,seed=13",
    "linear rank 0 of 3": "T=5,H=8,I=6,E=5,K=3,ep=3,ep_rank=0,expert_bias=1,seed=14",
    "linear rank 2 of 3": "T=5,H=8,I=6,E=5,K=3,ep=3,ep_rank=2,seed=14",
    "round robin": "T=5,H=8,I=6,E=5,K=3,ep=3,ep_rank=1,placement=round_robin,routing=minus1,seed=15",
    "a rank that nobody names": "T=1,H=4,I=4,E=8,K=1,ep=8,ep_rank=4,expert_bias=1,seed=16",
    "zero experts": "T=5,H=8,I=6,E=3,K=4,router=softmax:zero_experts=3,routing=dup,seed=17",
    "zero experts, all slots": "T=3,H=4,I=2,E=1,K=3,router=softmax:zero_experts=5,seed=18",
    "zero experts on the input": "T=5,H=4,I=2,E=2,K=1,weight_on_input=1,router=softmax:zero_experts=2,seed=19",
    "zero experts and scale": "T=5,H=4,I=2,E=2,K=2,router=softmax:zero_experts=2,scale_on_sum=2.5,seed=20",
    "fused shared": "T=5,H=8,I=6,E=3,K=2,router=sigmoid:fused_shared=2,routing=minus1,seed=21",
    "fused shared, ranks": "T=5,H=8,I=6,E=3,K=2,ep=2,ep_rank=1,router=sigmoid:fused_shared=2,expert_bias=1,seed=22",
    "shared": TINY + "shared=5,seed=23",
    "shared and gate": TINY + "shared=5,shared_gate=1,routing=none,seed=24",
    "shared ungated": TINY + "shared=5,shared_gate=1,act=relu2_no_mul,seed=25",
    "scale on sum": TINY + "scale_on_sum=2.5,shared=3,expert_bias=1,seed=26",
    "latent": TINY + "latent=3,seed=27",
    "latent and norm": TINY + "latent=5,latent_norm=1,routing=minus1,seed=28",
    "latent, norm, shared": TINY + "latent=4,latent_norm=1,shared=3,shared_gate=1,expert_bias=1,scale_on_sum=1.5,seed=29",
    "latent on the input": "T=5,H=8,I=6,E=4,K=1,latent=3,weight_on_input=1,seed=30",
    "interleaved": TINY + "act=swigluoai,expert_bias=1,shared=3,seed=31",
    "packed swigluoai": TINY + "act=swigluoai:packed,expert_bias=1,seed=32",
    "interleaved silu": TINY + "act=silu:interleaved,seed=33",
    "clamped": TINY + "act=silu:limit=1,seed=34",
    "clamped after": TINY + "act=swiglustep:limit=1,seed=35",
    "situ": TINY + "act=situ:beta=4:linear_beta=25,seed=36",
    "gelu": TINY + "act=gelu,values=hetero,seed=37",
    "gelu_tanh": TINY + "act=gelu_tanh,values=hetero,seed=38",
    "ungated": TINY + "act=silu_no_mul,expert_bias=1,seed=39",
    "integers": TINY + "values=int,act=relu_no_mul,seed=40",
    "saturated": TINY + "values=sat,seed=41",
}


def inputs_of(name: str) -> Inputs:
    return make_inputs(parse_case(CASES[name]))


def scattered(rows: Slots, inputs: Inputs, width: int) -> Tensor:
    """float64 (T, K, width): rows of the live slots, zero elsewhere."""
    T, K = inputs.topk_ids.shape
    out = torch.zeros(T, K, width, dtype=torch.float64)
    for (t, k), row in rows.items():
        out[t, k] = torch.tensor(row, dtype=torch.float64)
    return out


def table(rows: list[Row], width: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, width)


def agrees(got: Value, want: Tensor) -> None:
    """Equal to 1e-12 of the largest in the row, or to the last place of the format where the oracle rounded (bound 0)."""
    assert got.bound is not None and got.fmt is not None
    assert got.value.shape == want.shape and got.bound.shape == want.shape
    assert bool((got.bound >= 0).all())
    scale = want.abs().amax(dim=-1, keepdim=True) + 1e-30 if want.numel() else want
    rounding = torch.where(got.bound == 0, want.abs() * got.fmt.unit, 0.0)
    error = (got.value - want).abs()
    assert bool((error <= 1e-12 * scale + rounding).all()), f"off by {float(error.max())}"


def by_slot(t: Tensor, live: Tensor) -> Slots:
    rows = t.double().tolist()
    return {(i, j): rows[i][j] for i, j in live.nonzero().tolist()}


@pytest.mark.parametrize("name", CASES)
def test_chain_agrees_with_the_scalar_layer(name: str) -> None:
    inputs = inputs_of(name)
    p, layer = inputs.problem, Layer(inputs)
    gate_up = layer.gate_up()
    h = layer.h(gate_up)
    y = layer.y(h)
    got = chain(inputs, CLAIMS)

    assert list(got) == ["gate_up", "h", "y", "out"]
    agrees(got["gate_up"], scattered(gate_up, inputs, p.N))
    agrees(got["y"], scattered(y, inputs, p.hidden))
    agrees(got["out"], table(layer.out(layer.routed(y)), p.H))
    live = torch.zeros(inputs.topk_ids.shape, dtype=torch.bool)
    for t, k in layer.live:
        live[t, k] = True
    for tensor in ("gate_up", "h", "y"):
        assert torch.equal(got[tensor].live, live)
    agrees(Value(got["h"].value * live[..., None], got["h"].bound, None, p.fmt), scattered(h, inputs, p.I))
    assert got["out"].live is None, "every row of the output exists, also those of tokens that are not routed"


@pytest.mark.parametrize("name", CASES)
def test_isolated_stages_agree_with_the_scalar_layer(name: str) -> None:
    """Each stage fed tensors as a candidate would show them: rounded to the dtype, NaN where the slot is not live."""
    inputs = inputs_of(name)
    p, layer, live = inputs.problem, Layer(inputs), live_slots(inputs)
    fmt = p.fmt

    def shown(rows: Tensor) -> Tensor:
        return torch.where(live[..., None], rows, torch.nan).to(fmt.dtype)

    x = inputs.hidden_states
    if p.latent:
        x = table(layer.source(), p.latent)  # gemm1 is not judged alone there, but it must still compute
    gate_up = gemm1(inputs, x, fmt, CLAIMS)
    agrees(gate_up, scattered(layer.gate_up(), inputs, p.N))
    seen = shown(gate_up.value)

    h = activate(seen, p.act, fmt, CLAIMS, live)
    want_h = layer.h(by_slot(seen, live))
    agrees(
        Value(torch.where(live[..., None], h.value, 0.0), h.bound.nan_to_num(nan=0.0), None, fmt),
        scattered(want_h, inputs, p.I),
    )
    seen = shown(h.value)

    y = gemm2(inputs, seen, fmt, CLAIMS)
    agrees(y, scattered(layer.y(by_slot(seen, live)), inputs, p.hidden))
    seen = shown(y.value)

    for value in (gate_up, h, y):
        assert value.live is not None and torch.equal(value.live, live) and value.fmt is fmt
    if p.latent:
        return
    shared = shared_expert(inputs, CLAIMS)
    out = combine(inputs, seen, fmt, CLAIMS, shared)
    agrees(out, table(layer.out(layer.routed(by_slot(seen, live))), p.H))


@pytest.mark.parametrize("name", CASES)
def test_local_ids_are_those_of_the_rank(name: str) -> None:
    inputs = inputs_of(name)
    want = torch.full(inputs.topk_ids.shape, -1, dtype=torch.int64)
    for (t, k), local in Layer(inputs).live.items():
        want[t, k] = local

    assert torch.equal(local_ids(inputs), want)
    assert inputs.w1.shape[0] == len(inputs.problem.local)


def test_ids_far_out_of_range_are_not_live_and_not_read() -> None:
    inputs = inputs_of("round robin")
    wild = torch.tensor([[-1, -2, 5], [99, 2**31 - 1, -(2**31)], [0, 1, 4], [2, 3, 4], [1, 1, 1]], dtype=torch.int32)

    assert local_ids(inputs.map({"topk_ids": wild})).tolist() == [
        [-1, -1, -1],
        [-1, -1, -1],
        [-1, 0, 1],
        [-1, -1, 1],
        [0, 0, 0],
    ]


def test_weights_of_dead_slots_may_be_anything() -> None:
    """NaN and infinity beside an id of -1, or of another rank, must not reach the output."""
    for name in ("some -1", "all -1", "linear rank 2 of 3", "round robin", "fused shared", "weight on input"):
        inputs = inputs_of(name)
        dead = ~live_slots(inputs)
        for poison in (math.nan, math.inf, -1e30):
            changed = inputs.map({"topk_weights": torch.where(dead, poison, inputs.topk_weights)})
            assert torch.equal(chain(changed, CLAIMS)["out"].value, chain(inputs, CLAIMS)["out"].value), name
            assert bool(chain(changed, CLAIMS)["out"].bound.isfinite().all()), name


def test_a_row_without_a_live_slot_is_exactly_zero() -> None:
    for name in ("all -1", "some -1", "a rank that nobody names"):
        inputs = inputs_of(name)
        out, dead = chain(inputs, CLAIMS)["out"], ~live_slots(inputs).any(dim=1)

        assert bool(dead.any())
        assert bool((out.value[dead] == 0).all()) and bool((out.bound[dead] == 0).all())


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "line", ["T=5,H=8,I=6,E=5,K=3,expert_bias=1,seed=50", "T=5,H=8,I=6,E=3,K=2,router=sigmoid:fused_shared=2,seed=51"]
)
def test_the_ranks_partial_sums_add_up_to_the_whole(line: str, placement: str) -> None:
    whole = make_inputs(parse_case(line))
    for ranks in range(2, whole.problem.weight_experts + 1):
        parts = [
            chain(make_inputs(parse_case(f"{line},ep={ranks},ep_rank={r},placement={placement}")), CLAIMS) for r in range(ranks)
        ]
        total = sum(part["out"].value for part in parts)

        assert torch.allclose(total, chain(whole, CLAIMS)["out"].value, rtol=0, atol=1e-12)


def test_placement_shares_out_every_expert_once() -> None:
    for placement in PLACEMENTS:
        for experts in range(1, 14):
            for ranks in range(1, experts + 1):
                homes = [local_experts(experts, ranks, r, placement) for r in range(ranks)]
                sizes = [len(home) for home in homes]

                assert sorted(e for home in homes for e in home) == list(range(experts))
                assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True), "the first ranks hold one more"
                assert all(home == sorted(home) for home in homes)
                for r, home in enumerate(homes):
                    mapping = expert_map(experts, ranks, r, placement)
                    want = [home.index(e) if e in home else -1 for e in range(experts)]
                    assert (mapping is None) if ranks == 1 else (mapping.tolist() == want and mapping.dtype == torch.int32)


def test_input_rows_round_the_weighted_input_once() -> None:
    """On the input, w * x is stored in the dtype: twice rounded (through float32) would differ for this pair."""
    inputs = inputs_of("weight on input")
    rows = input_rows(inputs, inputs.hidden_states)
    layer = Layer(inputs)

    assert rows.shape == (5, 1, 8)
    assert bool((rows[~live_slots(inputs)] == 0).all())
    for t, k in layer.live:
        x, w = inputs.hidden_states[t].tolist(), layer.weight(t, k)
        assert rows[t, k].tolist() == [rounded(v * w, inputs.problem.fmt) for v in x]


def test_the_shared_expert_is_a_layer_of_its_own() -> None:
    inputs = inputs_of("shared")
    alone = Inputs(
        problem=Problem(T=5, H=8, I=5, E=1, K=1),
        hidden_states=inputs.hidden_states,
        topk_ids=torch.zeros(5, 1, dtype=torch.int32),
        topk_weights=torch.ones(5, 1),
        w1=inputs.shared_w1[None],
        w2=inputs.shared_w2[None],
    )
    value, allowed = shared_expert(inputs, CLAIMS)

    assert torch.allclose(value, chain(alone, CLAIMS)["out"].value, rtol=0, atol=1e-13)
    assert bool((allowed > 0).all())
    assert shared_expert(dataclasses.replace(inputs, problem=dataclasses.replace(inputs.problem, shared=0)), CLAIMS) is None
