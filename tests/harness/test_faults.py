"""A handful of planted faults per stage: each is caught, and blamed on the stage it was planted in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pipeline
import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Inputs, Stage

Tensor = torch.Tensor
LAYER = "T=33,H=104,I=72,E=8,K=2,router=softmax:renorm=sum"


@dataclass(frozen=True)
class Fault:
    """`why` names its class in docs/faults or the field report it stands for."""

    name: str
    stage: Stage
    plant: dict[str, Callable[..., object]]
    case: str = f"{LAYER},seed=1"
    token: int | None = None
    expert: int | None = None


def _route(change: Callable[[Tensor, Tensor, Inputs], tuple[Tensor, Tensor]]) -> dict[str, Callable[..., object]]:
    return {"route": lambda i: change(*pipeline.route(i), i)}


def _no_renorm(ids: Tensor, w: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    assert i.logits is not None
    return ids, i.logits.softmax(-1).gather(1, ids.long())


def _worst_expert(ids: Tensor, w: Tensor, i: Inputs) -> tuple[Tensor, Tensor]:
    assert i.logits is not None
    ids = ids.clone()
    ids[5, 1] = int(i.logits[5].argmin())
    return ids, w


def _gemm1(change: Callable[[Tensor, Inputs], Tensor]) -> dict[str, Callable[..., object]]:
    return {"gemm1": lambda i: change(pipeline.gemm1(i).clone(), i)}


def _k_tail(rows: Tensor, w: Tensor, ids: Tensor, tile: int = 64) -> Tensor:
    """Only whole K tiles are multiplied."""
    whole = rows.shape[-1] // tile * tile
    return pipeline.gemm(rows[..., :whole], w[..., :whole], ids)


def _wrong_expert(i: Inputs) -> Tensor:
    shifted = torch.where(i.topk_ids == 5, 6, i.topk_ids)
    return pipeline.gemm1(i.map({"topk_ids": shifted}))


def _first_copy_only(i: Inputs) -> Tensor:
    ids = i.topk_ids.clone()
    ids[:, 1:][ids[:, 1:] == ids[:, :1]] = -1
    return pipeline.gemm1(i.map({"topk_ids": ids}))


def _set(t: Tensor, at: tuple[object, ...], value: object) -> Tensor:
    t = t.clone()
    t[at] = value  # type: ignore[index]
    return t


def _swap_halves(x: Tensor) -> Tensor:
    return pipeline.act(torch.cat(x.chunk(2, -1)[::-1], -1))


def _gelu(x: Tensor) -> Tensor:
    g, u = x.float().chunk(2, -1)
    return (torch.nn.functional.gelu(g) * u).to(x.dtype)


def _truncate(x: Tensor) -> Tensor:
    """float32 to bf16 by dropping bits."""
    return (x.float().contiguous().view(torch.int32) & -65536).view(torch.float32)


def _act_truncated(x: Tensor) -> Tensor:
    g, u = x.float().chunk(2, -1)
    return _truncate(torch.nn.functional.silu(g) * u).to(x.dtype)


def _act_twice_rounded(x: Tensor) -> Tensor:
    g, u = x.chunk(2, -1)
    return torch.nn.functional.silu(g) * u


def _bf16_partial_sums(i: Inputs) -> Tensor:
    x = i.hidden_states[:, None].expand(*i.topk_ids.shape, -1)
    halves = [pipeline.gemm(part, w, i.topk_ids) for part, w in zip(x.split(13, -1), i.w1.split(13, -1), strict=True)]
    return sum(halves[1:], halves[0])


def _missing_tail(i: Inputs, h: Tensor) -> Tensor:
    return pipeline.gemm(h[..., :64], i.w2[..., :64], i.topk_ids)


def _no_weight(i: Inputs, y: Tensor) -> Tensor:
    return pipeline.combine(i.map({"topk_weights": torch.ones_like(i.topk_weights)}), y)


def _rolled_weights(i: Inputs, y: Tensor) -> Tensor:
    return pipeline.combine(i.map({"topk_weights": i.topk_weights.roll(1, 1)}), y)


def _bf16_running_sum(i: Inputs, y: Tensor) -> Tensor:
    out = torch.zeros_like(y[:, 0])
    for k in range(y.shape[1]):
        out = out + i.topk_weights[:, k, None].to(y.dtype) * y[:, k]
    return out


def _sums_dead_slots(i: Inputs, y: Tensor) -> Tensor:
    return (
        (i.topk_weights.nan_to_num(1.0)[:, :, None] * torch.where((i.topk_ids < 0)[:, :, None], 7.0, y.float()))
        .sum(1)
        .to(y.dtype)
    )


def _unwritten_columns(i: Inputs, y: Tensor) -> Tensor:
    out = torch.empty(y.shape[0], y.shape[2], dtype=y.dtype)
    out[:, :96] = pipeline.combine(i, y)[:, :96]
    return out


def _align(
    change: Callable[[Tensor, Tensor, Tensor, Inputs], tuple[Tensor, Tensor, Tensor]],
) -> dict[str, Callable[..., object]]:
    return {"align": lambda i: change(*pipeline.align(i), i)}


FAULTS = (
    Fault("router.not_renormalised", Stage.ROUTE, _route(_no_renorm)),
    Fault("router.logits_as_weights", Stage.ROUTE, _route(lambda ids, w, i: (ids, i.logits.gather(1, ids.long())))),  # type: ignore[union-attr]
    Fault("router.one_wrong_expert", Stage.ROUTE, _route(_worst_expert), token=5),
    Fault("router.same_expert_twice", Stage.ROUTE, _route(lambda ids, w, i: (_set(ids, (3, 1), ids[3, 0]), w)), token=3),
    Fault("router.id_out_of_range", Stage.ROUTE, _route(lambda ids, w, i: (_set(ids, (7, 0), 8), w)), token=7),
    Fault("permute.slot_dropped", Stage.PERMUTE, _align(lambda s, b, n, i: (torch.where(s == 9, 66, s), b, n)), token=4),
    Fault("permute.slot_twice", Stage.PERMUTE, _align(lambda s, b, n, i: (torch.where(s == 66, 12, s), b, n)), token=6),
    Fault("permute.block_of_neighbour", Stage.PERMUTE, _align(lambda s, b, n, i: (s, b.roll(1), n))),
    Fault("permute.too_few_rows", Stage.PERMUTE, _align(lambda s, b, n, i: (s, b, n - 4)), expert=7),
    Fault(
        "gemm1.k_tail",
        Stage.GEMM1,
        {"gemm1": lambda i: _k_tail(i.hidden_states[:, None].expand(*i.topk_ids.shape, -1), i.w1, i.topk_ids)},
    ),
    Fault("gemm1.neighbour_expert", Stage.GEMM1, {"gemm1": _wrong_expert}, expert=5),
    Fault("gemm1.last_columns_zero", Stage.GEMM1, _gemm1(lambda g, i: _set(g, (..., slice(-16, None)), 0))),
    Fault("gemm1.one_row_of_another_token", Stage.GEMM1, _gemm1(lambda g, i: _set(g, (11,), g[12])), token=11),
    Fault("gemm1.bf16_partial_sums", Stage.GEMM1, {"gemm1": _bf16_partial_sums}),
    Fault("gemm1.duplicate_dropped", Stage.GEMM1, {"gemm1": _first_copy_only}, f"{LAYER},routing=dup,seed=2"),
    Fault("act.halves_swapped", Stage.ACT, {"act": _swap_halves}),
    Fault("act.gelu_for_silu", Stage.ACT, {"act": _gelu}),
    Fault("act.truncated", Stage.ACT, {"act": _act_truncated}),
    Fault("act.rounded_twice", Stage.ACT, {"act": _act_twice_rounded}),
    Fault("act.width_tail", Stage.ACT, {"act": lambda x: _set(pipeline.act(x), (..., slice(64, None)), 0)}),
    Fault("gemm2.k_tail", Stage.GEMM2, {"gemm2": _missing_tail}),
    Fault("gemm2.token_zero", Stage.GEMM2, {"gemm2": lambda i, h: _set(pipeline.gemm2(i, h), (32,), 0)}, token=32),
    Fault("gemm2.columns_swapped", Stage.GEMM2, {"gemm2": lambda i, h: pipeline.gemm2(i, h).roll(1, -1)}),
    Fault("combine.no_weight", Stage.COMBINE, {"combine": _no_weight}),
    Fault("combine.weight_of_neighbour_slot", Stage.COMBINE, {"combine": _rolled_weights}),
    Fault(
        "combine.last_slot_missing", Stage.COMBINE, {"combine": lambda i, y: pipeline.combine(i, _set(y, (slice(None), -1), 0))}
    ),
    Fault("combine.bf16_running_sum", Stage.COMBINE, {"combine": _bf16_running_sum}),
    Fault("combine.sums_dead_slots", Stage.COMBINE, {"combine": _sums_dead_slots}, f"{LAYER},routing=minus1,seed=3"),
    Fault("combine.hidden_tail_unwritten", Stage.COMBINE, {"combine": _unwritten_columns}),
    Fault(
        "combine.one_percent_low", Stage.COMBINE, {"combine": lambda i, y: (pipeline.combine(i, y).float() * 0.99).to(y.dtype)}
    ),
)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.name)
def test_fault_is_caught_and_blamed_on_its_stage(fault: Fault) -> None:
    verdict = judge(pipeline.candidate(fault.name, **fault.plant), parse_case(fault.case), "cpu")

    assert verdict.outcome is Outcome.FAIL, verdict
    first = verdict.findings[0]
    assert first.stage is fault.stage, verdict
    if fault.token is not None:
        assert first.token == fault.token, verdict
    if fault.expert is not None:
        assert first.expert == fault.expert, verdict


@pytest.mark.parametrize(
    "case", sorted({f.case for f in FAULTS} | {f"{LAYER},values={v},seed=4" for v in ("int", "sat", "hetero")})
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_healthy_twin_passes(case: str, dtype: str) -> None:
    verdict = judge(pipeline.candidate(), parse_case(f"{case},dtype={dtype}"), "cpu")

    assert verdict.outcome is Outcome.PASS, verdict
    assert set(verdict.worst) >= {"topk_ids", "sorted_slots", "gate_up", "h", "y", "out"}


def test_patterns_name_the_expert_and_the_columns() -> None:
    verdict = judge(pipeline.candidate("wrong", gemm1=_wrong_expert), parse_case(f"{LAYER},seed=1"), "cpu")
    assert "rows of expert 5" in verdict.findings[0].pattern

    zero = _gemm1(lambda g, i: _set(g, (..., slice(-16, None)), 0))
    verdict = judge(pipeline.candidate("tail", **zero), parse_case(f"{LAYER},seed=1"), "cpu")
    assert "last 16 columns" in verdict.findings[0].pattern
