"""P65-P77: faults of unpermuting and of COMBINE."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
C = (Stage.COMBINE,)


def _late_row(right: Tensor, self: Any, y: Tensor, w: Tensor, start: int) -> Tensor:
    """One slot of one token is read before it came: its place still holds zero."""
    if not y.shape[0] or not self.dice():
        return right
    token, slot = self.dice.pick(y.shape[0]), self.dice.pick(y.shape[1])
    out = right.clone()
    out[token] -= torch.where(w[token, slot] != 0, w[token, slot] * y[token, slot].float(), 0.0)
    return out


def _not_cleared(right: Tensor, self: Any, y: Tensor, w: Tensor, start: int) -> Tensor:
    """Rows without a live slot keep what the accumulator held after the last call."""
    before = self.memory.get(("sum", start))
    out = right
    if before is not None and before.shape == right.shape:
        out = torch.where((w == 0).all(1, keepdim=True), before, right)
    self.memory["sum", start] = out
    return out


def _random_order(right: list[int], self: Any, K: int) -> list[int]:
    return self.dice.shuffled(K) if self.dice() else right


def _shape_zero(right: Any, _: Any, results: Any, message: Any, live: Tensor) -> Any:
    """A rank that received nothing answers with no rows and no width."""
    return right if bool(live.any()) else tuple(t.new_empty(1, 0) for t in results)


FAULTS = (
    Fault(
        "P65",
        "unpermute.sums_unwritten_slots",
        "vllm#46408, #52380",
        "-1 slots and dirty memory",
        C,
        {"": {"fill_dead": lambda right, _, y, live, inputs: y}},
    ),
    Fault(
        "P66",
        "unpermute.hidden_tail",
        "vllm#49087",
        "H % block != 0",
        C,
        {"": {"hidden_columns": lambda right, _, H: torch.arange(H // 16 * 16)}},
    ),
    Fault(
        "P67",
        "unpermute.weight_slot_mismatch",
        "vllm-xpu-kernels#66",
        "K > 1, unequal weights",
        C,
        {"": {"slot_weights": lambda right, _, weights, ids, on_input: right.roll(1, 1)}},
    ),
    Fault(
        "P68",
        "unpermute.topk_template",
        "candle-vllm#296",
        "K > 8",
        C,
        {"": {"slot_order": lambda right, _, K: right[:8]}},
    ),
    Fault(
        "P69",
        "unpermute.empty_rank_shape",
        "ROCm/Megatron-LM#155",
        "a rank that receives nothing",
        (None,),
        {"": {"give_back": _shape_zero}},
        ground="world",
        note="shows as an error of the call: the shapes do not fit",
    ),
    Fault(
        "P70",
        "combine.double_weight",
        "vllm#43694",
        "weight on the input",
        C,
        {"": {"slot_weights": lambda right, _, weights, ids, on_input: torch.where(ids >= 0, weights, 0.0)}},
    ),
    Fault(
        "P71",
        "combine.shared_times_ranks",
        "sglang#31475, #26845, mirage#722",
        "R > 1 and a shared expert",
        C,
        {"": {"adds_shared": lambda right, _, rank: True}},
        ground="world",
    ),
    Fault(
        "P72",
        "combine.extra_allreduce",
        "vllm#28277",
        "R > 1",
        C,
        {"": {"final_reduce": lambda right, self, total: total * self.num_ranks()}},
        ground="world",
    ),
    Fault(
        "P73",
        "combine.scaling_count",
        "sglang#8511, #8333, kvcache-ai/sglang#86",
        "scaling != 1",
        (Stage.COMBINE, Stage.ROUTE),
        {
            "never": {"scale_sum": lambda right, _, total, scale: total},
            "twice": {"scale_sum": lambda right, _, total, scale: right * scale},
            "twice in the router": {"scale": lambda right, _, w, ids, inputs: right * inputs.problem.router.scale},
        },
    ),
    Fault(
        "P74",
        "combine.bf16_running_sum",
        "vllm#15045, TIRx-kernels#208",
        "K >= 3",
        C,
        {"": {"add": lambda right, _, total, term, dtype: right.to(dtype).float()}},
    ),
    Fault(
        "P75",
        "combine.order_not_fixed",
        "transformers#43362, flashinfer#5221, vllm#54945",
        "K >= 3",
        C,
        {"": {"slot_order": _random_order}},
        random=True,
    ),
    Fault(
        "P76",
        "combine.late_row",
        "DeepEP#621",
        "timing",
        C,
        {"": {"sum_slots": _late_row}},
        random=True,
    ),
    Fault(
        "P77",
        "combine.not_cleared",
        "openvino#38288",
        "a second call with filtered slots",
        C,
        {"": {"sum_slots": _not_cleared}},
        ground="sequence",
    ),
)
