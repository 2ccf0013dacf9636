"""Findings say where errors sit and what would give them, and say nothing that does not explain every bad element."""

from __future__ import annotations

from collections.abc import Callable

import pipeline
import pytest
import test_faults
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pattern import describe
from moeproof.reference.contract import Inputs

Tensor = torch.Tensor
LAYER = "T=33,H=104,I=72,E=8,K=2,router=softmax:renorm=sum"


def mask(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.bool)


def test_halves_in_both_packings() -> None:
    bad = mask(5, 2, 12)
    bad[..., 7::2] = True
    assert describe(bad, None, "packed") == "every odd column of the up half"
    bad = mask(5, 2, 12)
    bad[..., 6:] = True
    assert describe(bad, None, "packed") == "the whole up half"
    bad = mask(5, 2, 12)
    bad[..., 0::2] = True
    assert describe(bad, None, "interleaved") == "the whole gate half"
    bad = mask(5, 2, 12)
    bad[..., 9::2] = True
    assert describe(bad, None, "interleaved") == "last 2 columns of the up half"
    assert describe(bad) == ""


def test_every_third_column_is_all_of_them() -> None:
    bad = mask(4, 12)
    bad[:, 1::3] = True
    assert describe(bad) == "every third column from 1"
    bad[:, 1] = False
    assert "every" not in describe(bad)


def test_partial_tiles() -> None:
    experts = torch.zeros(33, 1, dtype=torch.int64)
    experts[20:] = 5
    bad = mask(33, 1, 4)
    bad[16:20] = True
    assert describe(bad, experts).startswith("last partial M tile (4 of 20 rows) of expert 0")
    assert describe(bad | (experts == 5)[:, :, None], experts).startswith("rows 16 to 32") is False
    experts[20:] = 1
    experts[:3] = 2
    bad = mask(33, 1, 4)
    bad[19] = True
    assert describe(bad, experts) == "last partial M tile (1 of 17 rows) of expert 0, only token 19"
    many = torch.arange(2).repeat_interleave(18)[:, None]
    bad = mask(36, 1, 4)
    bad[[16, 17, 34, 35]] = True
    assert describe(bad, many) == "last partial M tile of 16 of every expert"
    bad[0] = True
    assert "tile" not in describe(bad, many)


def _k_tail_of_stage2(i: Inputs, h: Tensor) -> Tensor:
    return pipeline.gemm(h[..., :64], i.w2[..., :64], i.topk_ids)


def _wrong_rows(i: Inputs) -> Tensor:
    g = pipeline.gemm1(i).clone()
    g[11] = g[12]
    return g


WORDS: tuple[tuple[dict[str, Callable[..., object]], str], ...] = (
    (test_faults._align(lambda s, b, n, i: (s, b, n)), ""),
    ({"gemm2": _k_tail_of_stage2}, "as with a K tail of 8 (of 72) left out of GEMM2"),
    (
        {"gemm1": lambda i: test_faults._k_tail(i.hidden_states[:, None].expand(33, 2, -1), i.w1, i.topk_ids)},
        "a K tail of 40 (of 104)",
    ),
    ({"act": test_faults._swap_halves}, "as with gate and up swapped"),
    ({"act": test_faults._act_truncated}, "as with truncation instead of rounding"),
    ({"combine": lambda i, y: pipeline.combine(i, test_faults._set(y, (slice(None), -1), 0))}, "as with the last slot missing"),
    ({"combine": lambda i, y: pipeline.combine(i, y) * 0}, "equal to zeros of the right result"),
    ({"combine": lambda i, y: pipeline.combine(i, y).roll(1, 0)}, "equal to rows rolled by one of the right result"),
    ({"gemm1": _wrong_rows}, "token 11 holds the row of token 12"),
)


@pytest.mark.parametrize(("plant", "words"), WORDS, ids=[w or "healthy" for _, w in WORDS])
def test_a_finding_says_what_would_give_it(plant: dict[str, Callable[..., object]], words: str) -> None:
    verdict = judge(pipeline.candidate("bad", **plant), parse_case(f"{LAYER},seed=1"), "cpu")

    if words:
        assert words in verdict.findings[0].pattern, verdict
    else:
        assert not verdict.findings


def test_noise_is_not_explained() -> None:
    noisy = {"combine": lambda i, y: pipeline.combine(i, y) * (1 + 0.1 * torch.arange(104).cos()).to(y.dtype)}
    verdict = judge(pipeline.candidate("noisy", **noisy), parse_case(f"{LAYER},seed=1"), "cpu")

    assert "as with" not in verdict.findings[0].pattern
    assert "equal to" not in verdict.findings[0].pattern
