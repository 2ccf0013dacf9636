"""The same bytes everywhere: pinned digests, and a scalar specification in Python integers."""

from __future__ import annotations

import hashlib

import pytest
import torch

from moeproof.harness.cases.case import ROUTINGS, parse_case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.cases.recipes import place
from moeproof.reference.oracle import Selection, route

MASK = (1 << 64) - 1


def splitmix(key: int, index: int) -> int:
    """Word `index` of SplitMix64 (Steele, Lea and Flood, 2014) in plain integers."""
    x = (key + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def test_words_follow_the_specification() -> None:
    stream = Stream(7, "x")
    key = int.from_bytes(hashlib.sha256(b"7/x").digest()[:8], "little")
    words = [int(w) & MASK for w in torch.cat([stream.words(5), stream.words(4)])]

    assert words == [splitmix(key, i) for i in range(9)]


def test_published_splitmix_value() -> None:
    """First output for seed 0 of the reference implementation."""
    assert splitmix(0, 0) == 0xE220A8397B1DCDAF


def test_distributions() -> None:
    x = Stream(1, "normal").normal(200_000)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.var()) - 1) < 0.01

    n = Stream(1, "integers").integers(-3, 4, 70_000)
    assert n.unique().tolist() == [-3, -2, -1, 0, 1, 2, 3]
    assert int((n == 0).sum()) > 9_000

    order = Stream(1, "shuffled").shuffled(50, 6)
    assert bool((order.sort(dim=1).values == torch.arange(6)).all())
    assert order.unique(dim=0).shape[0] > 30


PINNED = {
    "T=5,H=24,I=16,E=4,K=2,seed=3": "59d2c4d1e9448f2c142071ab77df4f6f",
    "T=5,H=24,I=16,E=4,K=2,dtype=fp16,values=hetero,routing=minus1,seed=3": "9c496ed479e8252fed7ad1dfc19159aa",
    "T=5,H=24,I=16,E=6,K=2,values=sat,routing=dup,expert_bias=1,ep=2,ep_rank=1,seed=3": "894eb3b1d8e13fae355fd6c6419f65e5",
    "T=5,H=24,I=16,E=4,K=2,dtype=fp32,values=int,routing=zipf,storage=KN,seed=3": "5385a3275c31e309cfd5a8fea6a2f63a",
}


@pytest.mark.parametrize("line", PINNED)
def test_bytes_of_a_case_never_change(line: str) -> None:
    assert digest(make_inputs(parse_case(line)))[:32] == PINNED[line]


def test_strided_views_hold_the_same_values() -> None:
    plain = make_inputs(parse_case("T=5,H=24,I=16,E=4,K=2,seed=3"))
    strided = make_inputs(parse_case("T=5,H=24,I=16,E=4,K=2,strided=1,seed=3"))

    assert digest(plain) == digest(strided)
    assert not any(t.is_contiguous() for _, t in strided.tensors())


def test_a_rank_holds_the_bytes_that_a_single_rank_has() -> None:
    whole = make_inputs(parse_case("T=5,H=24,I=16,E=7,K=2,seed=3"))
    for rank in range(3):
        part = make_inputs(parse_case(f"T=5,H=24,I=16,E=7,K=2,ep=3,ep_rank={rank},placement=round_robin,seed=3"))
        assert torch.equal(part.w1, whole.w1[rank::3])
        assert torch.equal(part.topk_ids, whole.topk_ids)
        assert part.expert_map is not None
        assert part.expert_map.tolist() == [e // 3 if e % 3 == rank else -1 for e in range(7)]


@pytest.mark.parametrize("recipe", ROUTINGS)
def test_routing_recipes_do_what_they_say(recipe: str) -> None:
    i = make_inputs(parse_case(f"T=64,H=16,I=16,E=8,K=3,routing={recipe},seed=5"))
    ids = i.topk_ids.long()
    counts = ids[(ids >= 0) & (ids < 8)].bincount(minlength=8)
    repeated = bool((ids.sort(1).values.diff(dim=1) == 0).logical_and(ids.sort(1).values[:, 1:] >= 0).any())

    assert repeated == (recipe in ("dup", "beyond"))
    assert bool(i.topk_weights[ids < 0].isnan().all())
    if recipe in ("hot", "hot_first", "hot_middle", "hot_last"):
        hot = {"hot_first": 0, "hot_middle": 4, "hot_last": 7}.get(recipe, int(ids[0, 0]))
        assert ids[:, 0].tolist() == [hot] * 64
    elif recipe == "tile":
        assert set((counts % 16).tolist()) <= {0, 1, 2, 14, 15}
        assert {0, 1, 15} & set((counts % 16).tolist())
    elif recipe == "pair":
        assert sorted(counts.tolist())[-2:] == [64, 64]
    elif recipe == "trailing":
        assert bool((ids[:32] >= 0).all())
        assert bool((ids[32:] == -1).all())
    elif recipe == "beyond":
        beyond = ids >= 8
        assert 0 < int(beyond.sum()) < 64
        assert int(ids.max()) > 500
        assert bool(i.topk_weights[beyond].isnan().all())
    elif recipe == "empty":
        assert counts[[0, 4, 7]].tolist() == [0, 0, 0]
    elif recipe == "minus1":
        assert bool((ids[-8:] == -1).all())
        assert bool((ids[:-8] >= 0).any())
    elif recipe == "none":
        assert bool((ids == -1).all())
    elif recipe == "zipf":
        assert int(counts[0]) > 2 * int(counts[7])
    elif recipe == "router":
        choice: Selection = route(i)
        assert torch.equal(choice.ids, ids)


def test_the_later_of_two_entries_on_one_column_wins() -> None:
    """Whatever the device: one scatter of all entries leaves it open on a GPU."""
    out = place(torch.zeros(2, 4), torch.tensor([[1, 1, 3], [0, 2, 0]]), torch.tensor([[5.0, 6.0, 7.0], [5.0, 6.0, 7.0]]))

    assert out.tolist() == [[0.0, 6.0, 0.0, 7.0], [7.0, 0.0, 6.0, 0.0]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("values", ["normal", "hetero", "int", "sat", "tagged", "wide", "cancel"])
def test_a_gpu_draws_the_same_bytes(values: str) -> None:
    case = parse_case(f"T=37,H=104,I=48,E=6,K=2,values={values},routing=dup,seed=3")

    assert digest(make_inputs(case, "cuda")) == digest(make_inputs(case))
