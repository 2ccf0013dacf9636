"""Routing weights are judged for the experts that the candidate chose, also where float32 decides ties another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import Candidate, Claims, Inputs
from moeproof.reference.eager.router import route

Tensor = torch.Tensor
LINE = "T=33,H=16,I=16,E=8,K=3,router=sigmoid:renorm=sum"
Change = Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Tensor]]


def routed(change: Change, logits: str) -> Verdict:
    candidate = Candidate(
        "router",
        lambda i: dict(zip(("topk_ids", "topk_weights"), change(*route(i), i), strict=True)),
        shows=("topk_ids", "topk_weights"),
        claims=Claims(),
    )
    return judge(candidate, parse_case(f"{LINE},logits={logits},seed=2"), "cpu")


def highest_ids(ids: Tensor, weights: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Ties to the highest id instead of the lowest: as right, without the claim of the lowest."""
    assert inputs.logits is not None
    scores = inputs.logits.sigmoid()
    order = scores.flip(1).argsort(dim=1, descending=True, stable=True)[:, : ids.shape[1]]
    ids = inputs.logits.shape[1] - 1 - order
    weights = scores.gather(1, ids)
    return ids.int(), weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize("logits", ["normal", "ties", "deep"])
def test_weights_that_are_no_numbers_fail_whatever_the_logits(logits: str) -> None:
    verdict = routed(lambda ids, w, i: (ids, torch.full_like(w, torch.nan)), logits)

    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].tensor == "topk_weights"


def test_another_choice_among_ties_passes_with_its_own_weights() -> None:
    assert routed(highest_ids, "ties").outcome is Outcome.PASS


def test_and_fails_with_the_weights_of_others() -> None:
    def rolled(ids: Tensor, weights: Tensor, inputs: Inputs) -> tuple[Tensor, Tensor]:
        ids, weights = highest_ids(ids, weights, inputs)
        return ids, weights.roll(1, 1)

    verdict = routed(rolled, "ties")
    assert verdict.outcome is Outcome.FAIL
    assert verdict.findings[0].tensor == "topk_weights"
