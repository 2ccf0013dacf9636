"""P84-P91: faults of workspaces and of memory."""

from __future__ import annotations

from typing import Any

import torch

from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
CALL = (None,)
"""Damage around the call belongs to no stage."""


def _first_chunk_shape(right: Any, _: Any, y: Tensor, w: Tensor, start: int, stop: int) -> Any:
    """The offset of a chunk is its number times this chunk's rows."""
    rows = stop - start
    first = start // 16 * rows
    return y[first : first + rows], right[1]


def _stale_address(right: Inputs, self: Any, inputs: Inputs) -> Inputs:
    """w2 is read where it lay at the first call."""
    kept = self.memory.setdefault("w2", inputs.w2)
    fits = kept.shape == inputs.w2.shape and kept.dtype == inputs.w2.dtype
    return right.map({"w2": kept}) if fits else right


def _as_contiguous(name: str) -> Any:
    def wrong(right: Inputs, _: Any, inputs: Inputs) -> Inputs:
        t = getattr(inputs, name)
        stride = torch.empty(t.shape, device="meta").stride()
        return right.map({name: t.as_strided(t.shape, stride)})

    return wrong


def _in_front_of_w2(right: Tensor, _: Any, y: Tensor, live: Tensor, inputs: Inputs) -> Tensor:
    """Index -1 of a table that starts where w2 does."""
    w2, hidden = inputs.w2, y.shape[1]
    if w2.storage_offset() < hidden:
        return right
    before = w2.as_strided((hidden,), (1,), w2.storage_offset() - hidden)
    return torch.where(live[:, None], y, before)


FAULTS = (
    Fault(
        "P84",
        "ws.tail_chunk_shape",
        "vllm#20392, sglang#3679",
        "T = chunk + small",
        (Stage.COMBINE,),
        {"": {"chunk": _first_chunk_shape}},
        note="planted in the reduction, which works in chunks of 16 tokens: 17 are the first with a tail",
        least=17,
    ),
    Fault(
        "P85",
        "ws.output_aliases_intermediate",
        "vllm#29219",
        "always",
        (Stage.GEMM2, None),
        {"": {"home_of_y": lambda right, _: "2"}},
        note="where y is wider than h it also runs past the workspace",
    ),
    Fault(
        "P86",
        "ws.undersized",
        "aiter#2551, vllm#47982",
        "always",
        CALL,
        {"": {"workspace_elements": lambda right, _, rows, N, width, hidden: (right[0], max(right[1] - width, 0))}},
        note="one row too small",
    ),
    Fault(
        "P87",
        "ws.dangling",
        "TensorRT-LLM#5900",
        "a second call whose weights lie elsewhere",
        (Stage.GEMM2,),
        {"": {"admit": _stale_address}},
        ground="sequence",
    ),
    Fault(
        "P88",
        "mem.input_overwritten",
        "vllm#28939, FreeToken#463",
        "always",
        CALL,
        {"": {"output": lambda right, _, inputs: inputs.hidden_states}},
    ),
    Fault(
        "P89",
        "mem.contiguity_assumed",
        "ROCm/TransformerEngine#661, TensorRT-LLM#17332",
        "strided view",
        (Stage.DISPATCH, Stage.PERMUTE, Stage.GEMM1, Stage.GEMM2, Stage.COMBINE),
        {name: {"admit": _as_contiguous(name)} for name in ("hidden_states", "w1", "w2", "topk_weights")},
        note="each variant misreads another tensor, so each has its own stage",
    ),
    Fault(
        "P90",
        "mem.read_before_start",
        "vllm-gguf-plugin#133",
        "-1 ids",
        (Stage.COMBINE,),
        {"": {"fill_dead": _in_front_of_w2}},
    ),
    Fault(
        "P91",
        "mem.wrong_stream",
        "MoE-Infinity#80, #197",
        "side stream",
        (Stage.COMBINE,),
        {"": {"stream": lambda right, _: "default"}},
        on_gpu=("default stream",),
        note="the last kernel, on two simulated streams: the caller waits for its own and reads what nobody has written yet",
    ),
)
