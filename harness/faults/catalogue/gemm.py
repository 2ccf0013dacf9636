"""P38-P48 and P60-P64: faults of GEMM1 and GEMM2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moeproof.harness.faults.catalogue import scales
from moeproof.harness.faults.catalogue.quantise import quant_fault
from moeproof.harness.faults.fault import Fault
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
G1, G2, C = (Stage.GEMM1,), (Stage.GEMM2,), (Stage.COMBINE,)
FAR = "row * stride >= 2^31"
WRAPPED = "an offset that wraps leaves the allocation: what it reads is unwritten memory here, and a fault on a device"


def only(name: str, wrong: Callable[..., Any]) -> Callable[..., Any]:
    """The edit in one of the two GEMMs: the step's first argument says which runs."""
    return lambda right, self, gemm, *rest: wrong(right, self, gemm, *rest) if gemm == name else right


def _next_row(t: Tensor, count: int) -> Tensor:
    """The first columns of the row behind each row; behind the last row lies unwritten memory."""
    behind = torch.empty_like(t[..., -1:, :])
    return torch.cat([t[..., 1:, :], behind], dim=-2)[..., :count]


def _unmasked_tail(right: Any, _: Any, name: str, a: Tensor, w: Tensor, tile: Any) -> Any:
    more = min(-a.shape[1] % tile.K, a.shape[1])
    if not more or not a.shape[0]:
        return right
    return torch.cat([a, _next_row(a, more)], -1), torch.cat([w, _next_row(w, more)], -1)


def _wrapped(t: Tensor) -> Tensor:
    """Rows (or experts) whose offset does not fit 32 bits are read from somewhere else."""
    far = torch.arange(t.shape[0]) * t.stride(0) >= 2**31
    if not bool(far.any()):
        return t
    return torch.where(far.view(-1, *[1] * (t.dim() - 1)), torch.empty(t.shape, dtype=t.dtype), t)


def _wrapped_rows(right: Any, _: Any, name: str, a: Tensor, w: Tensor, tile: Any) -> Any:
    return _wrapped(a), w


def _wrapped_experts(right: Any, _: Any, name: str, a: Tensor, w: Tensor, tile: Any) -> Any:
    return a, _wrapped(w)


def _overhang(right: Tensor, _: Any, name: str, width: int, tile: Any) -> Tensor:
    return torch.arange(-(-width // tile.N) * tile.N)


def _wrong_divisor(right: Tensor, _: Any, row_tiles: int, column_tiles: int) -> Tensor:
    pid = torch.arange(row_tiles * column_tiles)
    return torch.stack([pid // max(row_tiles, 1), pid % max(row_tiles, 1)], 1)


def _dead_small_tile(right: Tensor, _: Any, name: str, row_tiles: int, column_tiles: int, plan: Any) -> Tensor:
    return torch.zeros_like(right) if plan.slots_total <= 32 else right


def _spills(right: Any, _: Any, rows: Tensor, source: Tensor, target: Tensor) -> Any:
    """Padding rows of the last tile become the rows that follow: the next group's."""
    there, here = right
    short = (here < 0).nonzero().flatten()
    after = (torch.arange(target.numel()) > int(rows[-1])) & (target >= 0)
    after = after.nonzero().flatten()[: short.numel()]
    there, here = there.clone(), here.clone()
    there[short[: after.numel()]], here[short[: after.numel()]] = source[after], target[after]
    return there, here


def _finer_blocks(right: Tensor, _: Any, name: str, plan: Any) -> Tensor:
    return right.repeat_interleave(2)[: right.numel()]


def _bias_unweighted(right: Tensor, self: Any, inputs: Any, y: Tensor, weights: Tensor) -> Tensor:
    """sum w (y - b) + sum b instead of sum w y."""
    if inputs.b2 is None or inputs.problem.inplace or inputs.problem.weight_on_input or inputs.problem.latent:
        return right
    local = self.local_ids(inputs.topk_ids, inputs)
    w = torch.where(local >= 0, 1.0 - weights, 0.0)
    delta = (w[:, :, None] * inputs.b2[local.clamp(min=0)].float()).sum(1)
    return (right.float() + inputs.problem.scale_on_sum * delta).to(right.dtype)


FAULTS = (
    Fault(
        "P38",
        "gemm1.k_tail_unmasked",
        "stk#12, kernels-community#1158, triton#7203",
        "H % BK != 0",
        G1,
        {"": {"k_operands": only("gemm1", _unmasked_tail)}},
    ),
    Fault(
        "P39",
        "gemm1.n_overhang_store",
        "kernels-community#1153",
        "N % BN != 0",
        G1,
        {"": {"columns": only("gemm1", _overhang)}},
    ),
    Fault(
        "P40",
        "gemm1.int32_offset",
        "sglang#4727, Liger-Kernel#1248, vllm#45884",
        FAR,
        G1,
        {
            "rows of x": {"k_operands": only("gemm1", _wrapped_rows)},
            "experts of w1": {"k_operands": only("gemm1", _wrapped_experts)},
        },
        note=WRAPPED,
    ),
    quant_fault(
        "P41",
        "gemm1.scale_window",
        "rocm-libraries#7920, vllm#6502, #43506",
        "BK != G, distinct group scales",
        G1,
        {
            "a tiles shorter than a group": (
                {"product": scales.window(64)},
                scales.in_w(lambda q: q.group in ((1, 128), (128, 128))),
            ),
            "b tiles longer than a group": (
                {"product": scales.window(128)},
                scales.in_w(lambda q: q.group in ((1, 16), (1, 32), (1, 64))),
            ),
        },
        {"one scale along a row of weights: every tile has it": scales.in_w(lambda q: not scales.grouped(q))},
    ),
    Fault(
        "P42",
        "gemm1.tile_map",
        "applied-ai#25",
        "rectangular tile grid",
        G1,
        {"": {"programs": _wrong_divisor}},
    ),
    Fault(
        "P43",
        "gemm1.small_m_tile_dead",
        "aiter#4451, flashinfer#2952",
        "T * K <= 32",
        G1,
        {"": {"covered": only("gemm1", _dead_small_tile)}},
    ),
    Fault(
        "P44",
        "gemm1.splitk_no_clear",
        "aiter#3997",
        "one row (split-K) and dirty memory",
        G1,
        {"": {"clear_partial": lambda right, _, buffer: buffer}},
    ),
    quant_fault(
        "P45",
        "gemm1.tail_scale_oob",
        "triton#10772",
        "K tail and a dirty neighbour",
        G1,
        {"": ({"product": scales.tail_scale_oob}, scales.in_w(lambda q: q.ragged and scales.grouped(q)))},
        {
            "one scale along a row of weights: a tail has it too": scales.in_w(lambda q: not scales.grouped(q)),
            "groups are whole: no tail has a scale of its own": scales.in_w(lambda q: not q.ragged),
        },
    ),
    Fault(
        "P46",
        "gemm1.small_group_spill",
        "DeepGEMM#268",
        "a group shorter than a tile",
        G1,
        {"": {"tile_rows": _spills}},
    ),
    Fault(
        "P47",
        "gemm1.empty_group_unwritten",
        "grouped_gemm#36, pytorch#172439",
        "no group has rows, and dirty memory",
        C,
        {"": {"fill_dead": lambda right, _, y, live, inputs: right if bool(live.any()) else y}},
        note="forward pass: what an empty group leaves unwritten is read only where a token has no live slot",
    ),
    Fault(
        "P48",
        "gemm1.skip_label_ignored",
        "DeepGEMM#34, #38",
        "blocks labelled -1 (remote experts)",
        C,
        {"": {"wanted": lambda right, _, expert: True}},
        note="the rows of such blocks are of no live slot: the sum is the first that reads them",
    ),
    Fault(
        "P60",
        "gemm2.bias_unweighted",
        "Automodel#2591",
        "down bias != 0",
        C,
        {"": {"combine": _bias_unweighted}},
        note="the bias enters after the weights, so the sum is wrong and y is not",
    ),
    Fault(
        "P61",
        "gemm2.bias_per_rank",
        "torchtitan#4245",
        "tensor-parallel ranks > 1 and a bias",
        G2,
        {"": {"adds_bias": only("gemm2", lambda right, _, name, rank: True)}},
        ground="tensor",
    ),
    Fault(
        "P62",
        "gemm2.k_tail_next_token",
        "kernels-community#1158",
        "I % BK != 0",
        G2,
        {"": {"k_operands": only("gemm2", _unmasked_tail)}},
    ),
    Fault(
        "P63",
        "gemm2.block_map_mismatch",
        "vllm-gguf-plugin#134",
        "BM of GEMM1 != BM of GEMM2",
        G2,
        {"": {"owners": only("gemm2", _finer_blocks)}},
    ),
    Fault(
        "P64",
        "gemm2.int32_offset",
        "sonic-moe#52, sglang#4856",
        FAR,
        G2,
        {"": {"k_operands": only("gemm2", _wrapped_experts)}},
        note=WRAPPED,
    ),
)
