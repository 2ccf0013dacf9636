"""Poison and guard bands do what they say, for every dtype and stride a candidate may meet."""

from __future__ import annotations

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.judging.memory import GUARD, PATTERNS, Poison, guard_inputs, guarded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_empty_is_poisoned_and_zeros_is_zero(dtype: torch.dtype, pattern: str) -> None:
    with Poison(pattern) as poison:
        made = [
            torch.empty(3, 5, dtype=dtype),
            torch.empty_like(torch.ones(3, 5).to(dtype)),
            torch.empty_strided((3, 5), (1, 3), dtype=dtype),
        ]
        zero = torch.zeros(3, 5, dtype=dtype)
    for t in made:
        raw = t.reshape(-1).view(torch.uint8)
        assert bool((raw != 0).any())
        assert t.shape == (3, 5)
    assert made[2].stride() == (1, 3)
    assert not bool(zero.view(torch.uint8).any())
    assert poison.damage() == []


def test_patterns_are_what_hurts_most() -> None:
    with Poison("nan"):
        assert bool(torch.empty(4).isnan().all())
        assert bool((torch.empty(4, dtype=torch.int32) > 2**30).all())
    with Poison("ff"):
        assert torch.empty(4, dtype=torch.int64).tolist() == [-1] * 4
    with Poison("big"):
        assert torch.empty(2, dtype=torch.bfloat16).tolist() == [9984.0, 9984.0]


@pytest.mark.parametrize("offset", [-1, -GUARD // 4, 6, 7, GUARD // 4 + 5])
def test_a_write_outside_is_seen_on_both_sides(offset: int) -> None:
    with Poison("nan") as poison:
        t = torch.empty(6)
        torch.as_strided(t, (1,), (1,), t.storage_offset() + offset).fill_(1.0)
    (words,) = poison.damage()

    assert ("before the start" in words) == (offset < 0)


def test_alignment_is_kept() -> None:
    for shape in ((3,), (7, 5), (1,)):
        t = guarded(shape, torch.empty(shape).stride(), torch.float16, torch.device("cpu"), "ff", "t").tensor
        assert t.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    "line", ["T=5,H=24,I=16,E=4,K=2", "T=5,H=24,I=16,E=4,K=2,strided=1,storage=KN", "T=0,H=24,I=16,E=4,K=2"]
)
def test_guarded_inputs_are_the_same_inputs(line: str) -> None:
    inputs = make_inputs(parse_case(line))
    copy, guards = guard_inputs(inputs, "nan")

    assert digest(copy) == digest(inputs)
    assert [t.stride() for _, t in copy.tensors()] == [t.stride() for _, t in inputs.tensors()]
    assert all(g.damage() is None for g in guards)

    if inputs.problem.T:
        copy.w1[0, 0, 0] += 1
        assert [g.name for g in guards if g.damage()] == ["w1"]


def test_holes_of_strided_views_are_guarded() -> None:
    inputs = make_inputs(parse_case("T=5,H=24,I=16,E=4,K=2,strided=1"))
    copy, guards = guard_inputs(inputs, "nan")
    x = copy.hidden_states
    hole = torch.as_strided(x, (1,), (1,), x.storage_offset() + 24)

    assert bool(hole.isnan())
    hole.fill_(0.0)
    assert [g.name for g in guards if g.damage()] == ["hidden_states"]


def test_index_minus_one_reads_the_pattern() -> None:
    """A row, an expert or a table entry before the first is poison, however wide it is."""
    inputs = make_inputs(parse_case("T=5,H=40,I=24,E=4,K=2,ep=2,seed=1"))
    copy, guards = guard_inputs(inputs, "nan")
    for name in ("hidden_states", "w1", "w2"):
        t = getattr(copy, name)
        before = t.as_strided(t.shape[1:], t.stride()[1:], t.storage_offset() - t.stride(0))
        assert bool(before.isnan().all()), name
    assert copy.expert_map is not None
    entry = copy.expert_map
    assert int(entry.as_strided((1,), (1,), entry.storage_offset() - 1)) == 0x7F7F7F7F

    copy.w1.as_strided((1,), (1,), copy.w1.storage_offset() - copy.w1.stride(0)).fill_(0)
    assert [g.name for g in guards if g.damage()] == ["w1"]
