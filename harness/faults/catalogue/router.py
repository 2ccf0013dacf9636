"""P01-P10: faults of ROUTE."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.route import NEG
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
ROUTE = (Stage.ROUTE,)


def _bias_in_weight(right: Tensor, _: Any, s: Tensor, choice: Tensor, x: Tensor, ids: Tensor, r: Any) -> Tensor:
    return right if r.score == "softmax_topk" else torch.where(x.gather(1, ids) == NEG, 0.0, choice.gather(1, ids))


def _always_renormalise(right: Tensor, self: Any, w: Tensor, r: Any) -> Tensor:
    return w / w.sum(-1, keepdim=True).clamp(min=1e-20) if r.renorm == "none" else right


def _raw_logits(right: Tensor, _: Any, s: Tensor, choice: Tensor, x: Tensor, ids: Tensor, r: Any) -> Tensor:
    return x.gather(1, ids) if r.renorm == "none" else right


def _scale_only_if_renormalised(right: Tensor, _: Any, w: Tensor, ids: Tensor, inputs: Any) -> Tensor:
    return w if inputs.problem.router.renorm == "none" else right


def _degenerate(fill: Any) -> Any:
    def wrong(right: tuple[Tensor, Tensor], _: Any, ids: Tensor, w: Tensor, inputs: Any) -> tuple[Tensor, Tensor]:
        bad = ~inputs.logits.isfinite().all(-1, keepdim=True)
        return torch.where(bad, fill(inputs.problem), ids), torch.where(bad, 0.0, w)

    return wrong


def _higher_id_wins(right: Tensor, _: Any, choice: Tensor, k: int) -> Tensor:
    return choice.shape[-1] - 1 - choice.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _all_maxima_masked(right: Tensor, _: Any, grouped: Tensor, r: Any) -> Tensor:
    if r.group_score != "top2":
        return right
    best = grouped.amax(-1, keepdim=True)
    second = torch.where(grouped == best, NEG, grouped).amax(-1)
    return best[..., 0] + torch.where(second == NEG, 0.0, second)


def _reads_eight_columns(right: Tensor, _: Any, s: Tensor, x: Tensor, inputs: Any) -> Tensor:
    out = right.clone()
    out[:, 8:] = NEG
    return out


def _writes_two_slots(right: Tensor, _: Any, choice: Tensor, r: Any, k: int) -> Tensor:
    out = right.clone()
    out[:, 2:] = 0
    return out


FAULTS = (
    Fault(
        "P01",
        "router.bias_in_weight",
        "vllm#12002, PaddleFormers#3452",
        "correction bias != 0",
        ROUTE,
        {"": {"gather": _bias_in_weight}},
    ),
    Fault(
        "P02",
        "router.group_mask_zero",
        "sglang#3705",
        "biased scores of kept groups negative at the K-th place",
        ROUTE,
        {"": {"reject": lambda right, _, choice, keep, r: torch.where(keep, choice, 0.0)}},
    ),
    Fault(
        "P03",
        "router.renorm_flag_ignored",
        "flashinfer#2889, vllm#31246, torchtitan#1448",
        "flag at the other value, K >= 2",
        ROUTE,
        {"always": {"renormalise": _always_renormalise}, "never": {"renormalise": lambda right, _, w, r: w}},
    ),
    Fault(
        "P04",
        "router.raw_logit_weight",
        "sglang#35160",
        "no renormalisation",
        ROUTE,
        {"": {"gather": _raw_logits}},
    ),
    Fault(
        "P05",
        "router.scaling_nested",
        "sglang-jax#1282, vllm#43769",
        "no renormalisation and scaling != 1",
        ROUTE,
        {"": {"scale": _scale_only_if_renormalised}},
    ),
    Fault(
        "P06",
        "router.nan_row_degenerate",
        "vllm#39391, sglang#30079, flashinfer#1347, colibri#558",
        "a row with NaN or infinite logits",
        ROUTE,
        {
            "expert 0 K times": {"bad_rows": _degenerate(lambda p: 0)},
            "minus one": {"bad_rows": _degenerate(lambda p: -1)},
            "E": {"bad_rows": _degenerate(lambda p: p.routed_ids)},
        },
    ),
    Fault(
        "P07",
        "router.renorm_zero_div",
        "sglang#31017, flashinfer#3803",
        "sigmoid, all selected logits < -103",
        ROUTE,
        {"": {"guard_divisor": lambda right, _, total, least: total}},
    ),
    Fault(
        "P08",
        "router.tie_order",
        "vllm#55514, tilelang-ascend#1048",
        "exact ties at the K-th place",
        ROUTE,
        {"higher id": {"top": _higher_id_wins}, "all maxima masked": {"group_scores": _all_maxima_masked}},
    ),
    Fault(
        "P09",
        "router.padding_routed",
        "Megatron-LM#5542, #4922",
        "padding rows present",
        (Stage.DISPATCH,),
        {
            "": {
                "pad_tokens": lambda right, _, ids: torch.where(
                    torch.arange(right.shape[0])[:, None] < ids.shape[0], right, torch.zeros_like(right)
                )
            }
        },
        note="the ids of padding rows are no shown tensor: the counts are the first that goes wrong",
    ),
    Fault(
        "P10",
        "router.shape_assumption",
        "llm-scaler#376",
        "(E, K) other than (8, 2)",
        ROUTE,
        {"eight columns": {"choice": _reads_eight_columns}, "two slots": {"select": _writes_two_slots}},
    ),
)
