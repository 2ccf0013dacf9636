"""End to end, what is made of a value that the dtype cannot hold is undefined, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.compare import within
from moeproof.reference.contract import Claims, Inputs
from moeproof.reference.oracle import chain

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


def test_nothing_is_undefined_within_the_range() -> None:
    trace = chain(make_inputs(parse_case(LINE)), Claims())

    assert all(bool(value.value.isfinite().all()) for value in trace.values())
