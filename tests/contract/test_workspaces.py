"""S14: workspaces are big enough, nothing beyond them is touched, and nothing depends on what they held."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from contract_kit import DEVICE, NAN, Crossed, apply, case, every_pair, every_part, expected_out, forward, same

from moeproof.reference.contract import Activation, ContractError, Pair

GUARD = 64


def shapes(part: Pair, layout: str) -> tuple[int, int, torch.dtype]:
    inputs = case(layout, ep=2, ep_rank=1, capacity=9 if layout == "batched" else 0)
    aq = inputs.hidden_states if layout == "standard" else inputs.hidden_states.new_empty(3, 9, 20)
    return part.experts(inputs).workspace_shapes(inputs.hidden_states, aq, aq.size(-2), 24, 20, 3, 7)


@every_part
def test_s14_s24_sizes_and_dtype(part: Pair) -> None:
    """workspace13 holds GEMM1's output and GEMM2's, workspace2 the activation's; local experts count, not global ones."""
    elements13, elements2, dtype = shapes(part, part.layout)
    rows = 5 * 3 if part.layout == "standard" else 3 * 9

    assert elements13 >= rows * 24
    assert elements2 >= rows * 12
    assert dtype == torch.bfloat16


@every_part
def test_s14_sizes_do_not_assume_a_gated_activation(part: Pair) -> None:
    inputs = case(part.layout, act=Activation("relu_no_mul"), I=30)
    aq = inputs.hidden_states if part.layout == "standard" else inputs.hidden_states.new_empty(7, 9, 20)
    _, elements2, _ = part.experts(inputs).workspace_shapes(inputs.hidden_states, aq, aq.size(-2), 30, 20, 3, 7)

    assert elements2 >= (5 * 3 if part.layout == "standard" else 7 * 9) * 30


@every_part
@pytest.mark.parametrize("fields", [{}, {"I": 6}], ids=["N>K", "N<K"])
def test_s14_decision_workspaces_contents_never_matter_and_guards_stay(part: Pair, fields: dict[str, int]) -> None:
    """NaN, all bits set, and large values before the call; guard bands on both sides of both workspaces."""
    inputs = case(part.layout, routing="minus1", ep=2, **fields)
    plain = apply(part, inputs, fill=lambda t: t.zero_())
    for fill in (lambda t: t.fill_(NAN), lambda t: t.view(torch.uint8).fill_(0xFF), lambda t: t.fill_(1e4)):
        guarded = []
        for size in (plain.workspace13.numel(), plain.workspace2.numel()):
            buffer = torch.empty(GUARD + size + GUARD, dtype=torch.bfloat16, device=DEVICE)
            fill(buffer)
            guarded.append(buffer)
        before = [buffer.clone().view(torch.uint8) for buffer in guarded]
        spaces = {name: b[GUARD:-GUARD] for name, b in zip(("workspace13", "workspace2"), guarded, strict=True)}

        got = apply(part, inputs, **spaces)

        same(got.y, plain.y)
        for buffer, old in zip(guarded, before, strict=True):
            now, edge = buffer.view(torch.uint8), 2 * GUARD
            assert torch.equal(now[:edge], old[:edge])
            assert torch.equal(now[-edge:], old[-edge:])


@every_part
def test_s14_the_previous_calls_result_is_no_input(part: Pair) -> None:
    first, second = case(part.layout, seed=1), case(part.layout, routing="minus1", seed=2)
    used = apply(part, first)

    again = apply(part, second, workspace13=used.workspace13, workspace2=used.workspace2)

    same(again.y, apply(part, second).y)


@every_part
@pytest.mark.parametrize("name", ["workspace13", "workspace2"])
def test_s14_a_workspace_too_small_or_of_another_dtype_is_refused(part: Pair, name: str) -> None:
    inputs = case(part.layout)
    for wrong in (torch.empty(3, dtype=torch.bfloat16, device=DEVICE), torch.empty(99999, dtype=torch.int32, device=DEVICE)):
        with pytest.raises(ContractError, match="workspace"):
            apply(part, inputs, **{name: wrong})


@contextlib.contextmanager
def nan_in_every_new_tensor() -> Iterator[None]:
    """torch.empty gives NaN (and the largest integers) instead of what the allocator left."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_pair
def test_s14_s11_uninitialised_memory_never_shows_in_the_output(pair: Crossed) -> None:
    inputs = case(pair.layout, routing="minus1", ep=2)
    with nan_in_every_new_tensor():
        assert torch.empty(1).isnan().all()
        out = forward(pair.kernel(inputs), inputs)

    same(out, expected_out(inputs))
