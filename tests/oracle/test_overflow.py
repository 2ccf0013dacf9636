"""What is made of a value that the dtype cannot hold is undefined, and nothing else is; stored, it overflows where it must."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.compare import within
from moeproof.harness.judging.quant_expect import judge_codes
from moeproof.reference.contract import FORMATS, SCHEMES, Claims, Inputs
from moeproof.reference.oracle import chain
from moeproof.reference.oracle.chain import spreads
from moeproof.reference.oracle.experts import live_slots
from moeproof.reference.oracle.overflow import undefined
from moeproof.reference.oracle.quant_stages import quant2, slot_scale
from moeproof.reference.oracle.value import stored

Tensor = torch.Tensor
LINE = "T=6,H=24,I=16,E=3,K=2,dtype=fp16,seed=2"
LOUD = 4
"""The token whose values leave fp16's range."""


def loud_x(i: Inputs) -> Inputs:
    """Pre-activations of the token overflow."""
    x = i.hidden_states.clone()
    x[LOUD] *= 3e4
    return i.map({"hidden_states": x})


def loud_y(i: Inputs) -> Inputs:
    """Pre-activations near the limit: h overflows, and y where h does not."""
    x = i.hidden_states.clone()
    x[LOUD] *= 600
    return i.map({"hidden_states": x})


def layer(i: Inputs, between: torch.dtype) -> Tensor:
    """out of a layer that keeps its intermediates in `between`."""
    out = torch.zeros(i.problem.T, i.problem.H, dtype=torch.float64)
    for token, ids in enumerate(i.topk_ids.tolist()):
        for slot, expert in enumerate(ids):
            gate, up = (i.w1[expert].double() @ i.hidden_states[token].double()).to(between).double().chunk(2)
            h = (torch.nn.functional.silu(gate) * up).to(between).double()
            y = (i.w2[expert].double() @ h).to(between).double()
            out[token] += i.topk_weights[token, slot].double() * y
    return out.to(torch.float16).double()


@pytest.mark.parametrize("loud", [loud_x, loud_y])
@pytest.mark.parametrize("between", [torch.float16, torch.float32], ids=["stored", "kept"])
def test_both_ways_to_overflow_are_right(loud: Callable[[Inputs], Inputs], between: torch.dtype) -> None:
    inputs = loud(make_inputs(parse_case(LINE)))
    want = chain(inputs, Claims())["out"]
    got = layer(inputs, between)
    undefined = want.value.isnan()

    assert bool(undefined[LOUD].any()) and not bool(undefined[:LOUD].any()) and not bool(undefined[LOUD + 1 :].any())
    assert bool(within(got, want)[~undefined].all())
    assert not bool(within(got * 1.1, want)[:LOUD].all(dim=1).any()), "other tokens are judged as before"


QUANT_LINE = "T=6,H=32,I=32,E=3,K=2,dtype=fp16,seed=2,scheme="
LARGEST = float(torch.finfo(torch.float16).max)


@pytest.mark.parametrize("scheme", ["fp8_token", "int8_tensor", "mxfp4_w4a4", "fp8_w8a16", "fp8_tensor_static2"])
def test_what_is_quantised_of_an_infinity_is_undefined_as_far_as_its_scale_reaches(scheme: str) -> None:
    inputs = loud_y(make_inputs(parse_case(QUANT_LINE + scheme)))
    taps = spreads(inputs, Claims())
    beyond = undefined(taps["h"].value, taps["h"].allowed, FORMATS["fp16"]) & live_slots(inputs)[..., None]
    a2 = SCHEMES[scheme].a2
    lost = beyond.any(-1)
    if a2 is not None and a2.static:
        lost = taps["h"].value.isnan().any(-1)
    elif a2 is not None and not a2.by_token:
        lost = lost.any() & live_slots(inputs)

    assert bool(beyond.any()) and bool(beyond.any(-1)[LOUD].any()) and not bool(beyond[:LOUD].any())
    assert torch.equal(taps["y"].value.isnan(), lost[..., None].expand_as(taps["y"].value))
    assert bool(taps["out"].value[~lost.any(-1)].isfinite().all())


def test_under_a_static_scale_infinity_saturates_and_stays_judged() -> None:
    """h of some 10^5: stored as infinity or kept in float32, its code is the format's largest; one step less is caught."""
    inputs = make_inputs(parse_case(QUANT_LINE + "fp8_tensor_static2"))
    h = torch.full((6, 2, 32), 1.0, dtype=torch.float64)
    h[LOUD, :, 3] = 1e5
    a2, given = inputs.problem.quant.a2, slot_scale(inputs, inputs.a2_scale)
    codes = [quant2(inputs, t) for t in (h, h.to(torch.float16))]

    assert not bool(undefined(h, torch.ones_like(h), FORMATS["fp16"], a2, given).any())
    assert all(bool(c.defined is not None and c.defined.all()) for c in codes)
    assert torch.equal(codes[0].q, codes[1].q) and float(codes[0].q[LOUD, 0, 3]) == 448
    shown = {"h": h.to(torch.float16), "hq": codes[1].codes(), "hs": codes[1].scale(FORMATS["fp16"])}
    assert not judge_codes(shown, inputs)["hq"].findings
    shown["hq"] = shown["hq"].clone()
    shown["hq"][LOUD, 0, 3] = 416.0
    finding = judge_codes(shown, inputs)["hq"].findings[0]
    assert (finding.token, finding.slot, finding.column, finding.want) == (LOUD, 0, 3, 448.0)


def test_a_static_scale_that_reaches_beyond_the_dtype_leaves_infinity_undefined() -> None:
    a2, h = SCHEMES["fp8_tensor_static2"].a2, torch.tensor([LARGEST, 7e4]).double()
    none, far = torch.zeros_like(h), torch.tensor(200.0).double()  # 448 * 200 = 89,600

    assert undefined(h, none, FORMATS["fp16"], a2, far).tolist() == [False, True]
    assert undefined(h, none, FORMATS["fp16"], a2, far / 2).tolist() == [False, False]


@pytest.mark.parametrize(
    ("exact", "error", "largest", "infinity"),
    [
        (LARGEST - 14, 0.0, True, False),  # half a step is 16
        (LARGEST + 15.5, 0.0, True, False),
        (LARGEST + 15.5, 0.6, True, True),
        (LARGEST + 16.5, 0.6, True, True),
        (LARGEST + 17, 0.5, False, True),
        (2 * LARGEST, 1.0, False, True),
    ],
)
def test_near_the_maximum_what_may_round_to_it_may_and_what_may_overflow_may(
    exact: float, error: float, largest: bool, infinity: bool
) -> None:
    """Of results within `error` of the exact one, at least one rounds to what is accepted; who saturates a value that must
    overflow is wrong, and so is who overflows one that fits."""
    want = stored(torch.tensor([exact]).double(), torch.tensor([error]).double(), FORMATS["fp16"])
    accepted = [bool(within(torch.tensor([got]).double(), want)) for got in (LARGEST, math.inf, -math.inf, math.nan)]
    rounded = {float(torch.tensor(exact + side, dtype=torch.float64).to(torch.float16)) for side in (-error, 0.0, error)}

    assert accepted == [largest, infinity, False, False]
    assert (LARGEST in rounded, math.inf in rounded) == (largest, infinity)


def test_nothing_is_undefined_within_the_range() -> None:
    trace = chain(make_inputs(parse_case(LINE)), Claims())

    assert all(bool(value.value.isfinite().all()) for value in trace.values())
