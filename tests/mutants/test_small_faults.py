"""Faults that the catalogue does not name: single rows, single columns, and arithmetic that is only slightly off."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from moeproof.harness.case import parse_case
from moeproof.harness.faults.fault import Edit, plant
from moeproof.harness.faults.pipeline import Pipeline, candidate
from moeproof.harness.judge import judge
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import Stage

Tensor = torch.Tensor
LAYER = "T=33,H=104,I=72,E=8,K=2,router=softmax:renorm=sum"


@dataclass(frozen=True)
class Small:
    name: str
    stage: Stage
    edit: Edit
    case: str = f"{LAYER},seed=1"
    token: int | None = None
    expert: int | None = None


def _set(t: Tensor, at: tuple[object, ...], value: object) -> Tensor:
    t = t.clone()
    t[at] = value  # type: ignore[index]
    return t


def _ids(at: tuple[int, int], value: Callable[[Tensor, Any], object]) -> Edit:
    """One id of the router replaced."""
    return {"route": lambda right, _, inputs: (_set(right[0], at, value(right[0], inputs)), right[1])}


def _plan(**change: Callable[[Any], object]) -> Edit:
    """Fields of the plan replaced. The last axis of the map is taken as it is by GEMM1 too: the map is judged first."""
    return {"plan": lambda right, *_: replace(right, **{k: f(right) for k, f in change.items()})}


def _gate_up(change: Callable[[Tensor], Tensor]) -> Edit:
    return {"experts": lambda right, *_: (change(right[0]), right[1], right[2])}


def _y(change: Callable[[Tensor], Tensor]) -> Edit:
    return {"experts": lambda right, *_: (right[0], right[1], change(right[2]))}


def _partial_sums(right: Tensor, _: Any, name: str, x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    """Rounded to bf16 every 13 terms."""
    if name != "gemm1":
        return right
    total = torch.zeros_like(right)
    for part in torch.arange(x.shape[1]).split(13):
        total = (total + x[:, part] @ w[:, part].T).bfloat16().float()
    return total


def _truncated(right: Tensor, self: Any, gate_up: Tensor, act: Any) -> Tensor:
    """float32 to bf16 by dropping bits."""
    exact = self.gate(self.halves(gate_up.float(), act)[0], act) * self.halves(gate_up.float(), act)[1]
    return (exact.contiguous().view(torch.int32) & -65536).view(torch.float32).to(right.dtype)


def _rounded_twice(right: Tensor, self: Any, g: Tensor, act: Any) -> Tensor:
    return right.bfloat16().float()


def _swap(shift: int) -> Callable[..., Tensor]:
    return lambda right, _, name, plan: torch.where(right == 5, 5 + shift, right) if name == "gemm1" else right


SMALL = (
    Small("router.one_wrong_expert", Stage.ROUTE, _ids((5, 1), lambda ids, i: int(i.logits[5].argmin())), token=5),
    Small("router.same_expert_twice", Stage.ROUTE, _ids((3, 1), lambda ids, i: ids[3, 0]), token=3),
    Small("router.id_out_of_range", Stage.ROUTE, _ids((7, 0), lambda ids, i: 8), token=7),
    Small("permute.slot_dropped", Stage.PERMUTE, _plan(slots=lambda p: torch.where(p.slots == 9, 80, p.slots)), token=4),
    Small(
        "permute.slot_twice",
        Stage.PERMUTE,
        _plan(slots=lambda p: torch.where((p.slots >= 66) & (torch.arange(p.slots.numel()) < p.used), 12, p.slots)),
        token=6,
    ),
    Small("permute.block_of_neighbour", Stage.PERMUTE, _plan(blocks=lambda p: p.blocks.roll(1))),
    Small("permute.too_few_rows", Stage.PERMUTE, _plan(used=lambda p: p.used - p.block), expert=7),
    Small("gemm1.neighbour_expert", Stage.GEMM1, {"owners": _swap(1)}, expert=5),
    Small("gemm1.last_columns_zero", Stage.GEMM1, _gate_up(lambda g: _set(g, (..., slice(-16, None)), 0))),
    Small("gemm1.one_row_of_another_slot", Stage.GEMM1, _gate_up(lambda g: _set(g, (22,), g[24])), token=11),
    Small("gemm1.bf16_partial_sums", Stage.GEMM1, {"multiply": _partial_sums}),
    Small("act.truncated", Stage.ACT, {"activate": _truncated}),
    Small("act.rounded_twice", Stage.ACT, {"gate": _rounded_twice}),
    Small("gemm2.token_zero", Stage.GEMM2, _y(lambda y: _set(y, (slice(64, 66),), 0)), token=32),
    Small("gemm2.columns_rolled", Stage.GEMM2, _y(lambda y: y.roll(1, -1))),
    Small("combine.no_weight", Stage.COMBINE, {"slot_weights": lambda right, *_: torch.ones_like(right)}),
    Small("combine.last_slot_missing", Stage.COMBINE, {"slot_order": lambda right, _, K: right[:-1]}),
    Small("combine.one_percent_low", Stage.COMBINE, {"final_reduce": lambda right, _, total: total * 0.99}),
)


def _judge(small: Small, armed: bool = True) -> Verdict:
    pipeline = Pipeline()
    witness = plant(pipeline, small.edit, armed)
    verdict = judge(candidate(pipeline, small.name), parse_case(small.case), "cpu")
    assert witness.fired
    return verdict


@pytest.mark.parametrize("small", SMALL, ids=lambda f: f.name)
def test_a_small_fault_is_caught_and_blamed_on_its_stage(small: Small) -> None:
    verdict = _judge(small)

    assert verdict.outcome is Outcome.FAIL, verdict
    first = verdict.findings[0]
    assert first.stage is small.stage, verdict
    if small.token is not None:
        assert first.token == small.token, verdict
    if small.expert is not None:
        assert first.expert == small.expert, verdict


@pytest.mark.parametrize("case", [f"{LAYER},seed=1", *(f"{LAYER},values={v},seed=4" for v in ("int", "sat", "hetero"))])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_healthy_pipeline_passes(case: str, dtype: str) -> None:
    verdict = judge(candidate(Pipeline()), parse_case(f"{case},dtype={dtype}"), "cpu")

    assert verdict.outcome is Outcome.PASS, verdict
    assert set(verdict.worst) >= {"topk_ids", "sorted_slots", "gate_up", "h", "y", "out"}


def test_patterns_name_the_expert_and_the_columns() -> None:
    by_name = {s.name: s for s in SMALL}

    assert "rows of expert 5" in _judge(by_name["gemm1.neighbour_expert"]).findings[0].pattern
    assert "last 16 columns" in _judge(by_name["gemm1.last_columns_zero"]).findings[0].pattern
