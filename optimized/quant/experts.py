"""The seed's [Permute-Experts-Unpermute] on quantised operands, in both layouts: align, GEMM1, ACT + QUANT2, GEMM2."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeproof.optimized.activation import activate
from moeproof.optimized.align import Alignment, align
from moeproof.optimized.experts import _TritonExperts
from moeproof.optimized.quant.gemm import Rows, Weights, batched_scaled_gemm, grouped_scaled_gemm
from moeproof.optimized.quant.quantise import code_buffers, quantise
from moeproof.optimized.quant.tiles import mean_rows
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.checks import check_workspaces
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import Format, format_of
from moeproof.reference.contract.modular import moe_problem_size
from moeproof.reference.contract.quant_checks import (
    as_received,
    check_activation,
    check_global,
    check_quantised,
    check_static_scale,
)
from moeproof.reference.contract.schemes import ALL, Quantiser, QuantScheme

Tensor = torch.Tensor


@dataclass(frozen=True)
class Levels:
    """What the seed's `apply` has no argument for: second levels of two-level scales. None where the scheme has none."""

    a1: Tensor | None = None
    """float32 (1, 1)."""
    w1: Tensor | None = None
    """float32 (e, 1, 1)."""
    w2: Tensor | None = None


def needs_h(q: Quantiser | None, keep: bool) -> bool:
    """Whether the unquantised activation is stored: as GEMM2's operand, as a tap, or until its amax is known."""
    return keep or q is None or (q.group == (ALL, ALL) and not q.static)


def requantise(
    gate_up_RN: Tensor,
    h_RI: Tensor | None,
    act: Activation,
    q: Quantiser | None,
    dtype: Format,
    a2_scale: Tensor | None,
    into: tuple[Tensor, Tensor] | None,
    slots: Slots | None = None,
    counts: Tensor | None = None,
) -> Rows:
    """ACT and QUANT2 of live rows (R, N): GEMM2's operand. h is stored where it is given."""
    if q is None:
        assert h_RI is not None
        activate(gate_up_RN, h_RI, act, slots=slots, counts=counts)
        return Rows(h_RI)
    codes, scale = quantise(gate_up_RN, q, dtype, a2_scale, act=act, slots=slots, counts=counts, h_RI=h_RI, into=into)
    return Rows(codes, q, scale, a2_scale if q.two_level else None)


def run_experts(
    x: Rows,
    w1: Weights,
    w2: Weights,
    slots: Slots,
    act: Activation,
    q2: Quantiser | None,
    dtype: Format,
    a2_scale: Tensor | None,
    gate_up_SN: Tensor,
    h_SI: Tensor | None,
    y_SH: Tensor,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Alignment, Rows]:
    """Standard layout, into contiguous (S, .) buffers: the alignment and GEMM2's operand. Dead slots' rows stay as they are."""
    alignment = align(slots, rows_per_block(slots.count, slots.num_experts))
    grouped_scaled_gemm(x, w1, gate_up_SN, alignment, slots.K, dtype)
    rows = requantise(gate_up_SN, h_SI, act, q2, dtype, a2_scale, into, slots=slots)
    grouped_scaled_gemm(rows, w2, y_SH, alignment, 1, dtype)
    return alignment, rows


class _QuantExperts(_TritonExperts):
    """What both layouts share. `keep_h` stores the unquantised activation first in workspace2, for whoever wants to see it."""

    def __init__(
        self,
        scheme: QuantScheme,
        levels: Levels | None = None,
        b1: Tensor | None = None,
        b2: Tensor | None = None,
        act: Activation | None = None,
        keep_h: bool = False,
    ) -> None:
        super().__init__(b1, b2, act)
        check(scheme.w is not None, f"scheme {scheme.name} does not quantise weights")
        self.scheme = scheme
        self.levels = levels or Levels()
        self.keep_h = keep_h
        self.last: tuple[Tensor | None, Rows, tuple[int, int]] | None = None
        """h, GEMM2's operand and the rows' shape in the last `apply`."""

    def _sizes2(self, rows: int, I: int, itemsize: int) -> tuple[int, int]:  # noqa: E741  (the project's letter)
        """Elements of workspace2 for h and for its codes."""
        q = self.scheme.a2
        h = rows * I if needs_h(q, self.keep_h) else 0
        return h, 0 if q is None else -(-rows * q.code_shape(I)[0] // itemsize)

    def _workspaces(self, rows: int, N: int, K: int, itemsize: int = 2) -> tuple[int, int]:
        return rows * max(N, K), sum(self._sizes2(rows, self._intermediate(N, self.act), itemsize))

    def _buffers(
        self,
        workspace13: Tensor,
        workspace2: Tensor,
        rows: int,
        N: int,
        K: int,
        I: int,  # noqa: E741
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None, Tensor]:
        """gate_up (rows, N), h (rows, I) or None, (hq, hs) or None, y (rows, K), which shares its storage with gate_up.

        Scales are too few to be worth a place in a workspace, whose alignment they would have to respect.
        """
        check_workspaces(workspace13, workspace2)
        h, hq = self._sizes2(rows, I, workspace2.dtype.itemsize)
        for name, space, needed in (("workspace13", workspace13, rows * max(N, K)), ("workspace2", workspace2, h + hq)):
            check(space.numel() >= needed, f"{name} has {space.numel()} elements, this call needs {needed}")
            check(space.is_contiguous(), f"{name} must be contiguous")
        into, q = None, self.scheme.a2
        if q is not None:
            _, scale = code_buffers(q, format_of(workspace2.dtype), rows, I, workspace2.device)
            bytes_ = workspace2[h : h + hq].view(torch.uint8)[: rows * q.code_shape(I)[0]]
            into = bytes_.view(q.format.dtype).view(q.code_shape(rows, I)), scale
        gate_up, y = workspace13[: rows * N].view(rows, N), workspace13[: rows * K].view(rows, K)
        return gate_up, workspace2[:h].view(rows, I) if h else None, into, y

    def _operands(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        act: Activation,
        scales: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
        dtype: torch.dtype,
    ) -> tuple[Rows, Weights, Weights]:
        """Everything checked, before any launch. `scales`: w1, w2, w1_zp, w2_zp, a1q, a2."""
        w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale = scales
        scheme, levels = self.scheme, self.levels
        assert scheme.w is not None
        e, _, N, K, _ = moe_problem_size(hidden_states, w1, w2, topk_ids)
        I = w2.size(2) * scheme.w.format.per_byte  # noqa: E741  (the project's letter)
        check(
            act.width_in(I) == N,
            f"w1 has {N} rows per expert and w2 {I} input columns; '{act}' needs {act.width_in(I)} rows",
        )
        check_quantised(scheme, dtype, (e, N, K, I), w1, w2, w1_scale, w2_scale, w1_zp, w2_zp, a2_scale)
        check_activation("hidden_states", scheme.a1, hidden_states, a1q_scale, K, dtype)
        check_global("w1_global", scheme.w, levels.w1, e, w1.device)
        check_global("w2_global", scheme.w, levels.w2, e, w1.device)
        if scheme.a1 is not None and scheme.a1.two_level:
            check_static_scale("a1_scale", scheme.a1, levels.a1, 0, w1.device)
        for name, b, rows in (("b1", self.b1, N), ("b2", self.b2, K)):
            check(b is None or tuple(b.shape) == (e, rows), f"{name} must be {(e, rows)}")
        assert w1_scale is not None and w2_scale is not None
        a1 = None if scheme.a1 is None else as_received(scheme.a1, a1q_scale)
        x = Rows(hidden_states, a1, a1q_scale, levels.a1)
        first = Weights(w1, scheme.w, w1_scale, w1_zp, levels.w1, self.b1)
        return x, first, replace(first, codes=w2, scale=w2_scale, zp=w2_zp, level=levels.w2, bias=self.b2)

    def taps(self) -> dict[str, Tensor]:
        """What the last `apply` left behind, in the layout's own coordinates: h where it was kept, hq and hs."""
        return {} if self.last is None else shown_rows(*self.last)


class QuantExperts(_QuantExperts):
    """Standard layout: codes (M, K) in, (M, topk, K) out. Rows of slots that are not routed here are zeros."""

    def workspace_shapes(
        self, a: Tensor, aq: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return *self._workspaces(M * topk, N, K, a.dtype.itemsize), a.dtype

    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        check(hidden_states.dim() == 2, f"hidden_states has {hidden_states.dim()} dims; the standard layout has 2")
        act, dtype = self._activation(activation), workspace13.dtype
        scales = (w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale)
        x, first, second = self._operands(hidden_states, w1, w2, topk_ids, act, scales, dtype)
        e, M, N, K, topk = moe_problem_size(hidden_states, w1, w2, topk_ids)
        gate_up, h, into, y = self._buffers(workspace13, workspace2, M * topk, N, K, N // act.width_in(1))
        slots = Slots(topk_ids, e if global_num_experts == -1 else global_num_experts, e, expert_map)
        _, rows = run_experts(x, first, second, slots, act, self.scheme.a2, format_of(dtype), a2_scale, gate_up, h, y, into)
        clear_dead(y, slots)
        self.last = (h, rows, (M, topk))
        return y.view(M, topk, K)


def shown_rows(h_RI: Tensor | None, rows: Rows, shape: tuple[int, int]) -> dict[str, Tensor]:
    """h, hq and hs as (T, K, .), or as (e, C, .) for the batched layout's rows, as far as they exist."""
    shown = {} if h_RI is None else {"h": h_RI.unflatten(0, shape)}
    if rows.quantiser is not None:
        assert rows.scale is not None
        shown["hq"] = rows.values.unflatten(0, shape)
        shown["hs"] = rows.scale.unflatten(0, shape) if rows.quantiser.by_token else rows.scale[None]
    return shown


class QuantBatchedExperts(_QuantExperts):
    """Batched layout: codes (e, C, K) in, (e, C, K) out. Rows beyond an expert's count are neither read nor written."""

    def workspace_shapes(
        self, a: Tensor, aq: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return *self._workspaces(aq.size(0) * M, N, K, a.dtype.itemsize), a.dtype

    def apply(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_ids: Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: Tensor | None,
        w1_scale: Tensor | None,
        w2_scale: Tensor | None,
        w1_zp: Tensor | None,
        w2_zp: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_num_tokens: Tensor | None,
    ) -> Tensor:
        check(hidden_states.dim() == 3, f"hidden_states has {hidden_states.dim()} dims; the batched layout has 3")
        check(expert_num_tokens is not None, "expert_num_tokens is None; the batched layout needs the counts")
        counts = expert_num_tokens
        assert counts is not None
        act, dtype = self._activation(activation), workspace13.dtype
        scales = (w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale)
        x, first, second = self._operands(hidden_states, w1, w2, topk_ids, act, scales, dtype)
        e, C, N, K, _ = moe_problem_size(hidden_states, w1, w2, topk_ids)
        gate_up, h, into, y = self._buffers(workspace13, workspace2, e * C, N, K, N // act.width_in(1))
        mean = mean_rows(topk_ids.numel(), max(global_num_experts, e), C)
        batched_scaled_gemm(x, first, gate_up.unflatten(0, (e, C)), counts, format_of(dtype), mean)
        rows = requantise(gate_up, h, act, self.scheme.a2, format_of(dtype), a2_scale, into, counts=counts)
        self.last = (h, rows, (e, C))
        batched_scaled_gemm(_regions(rows, e, C), second, y.unflatten(0, (e, C)), counts, format_of(dtype), mean)
        return y.view(e, C, K)


def _regions(rows: Rows, e: int, C: int) -> Rows:
    """Rows (e * C, .) as (e, C, .); one scale for all stays as it is."""
    scale = rows.scale
    if rows.quantiser is not None and rows.quantiser.by_token:
        assert scale is not None
        scale = scale.unflatten(0, (e, C))
    return replace(rows, values=rows.values.unflatten(0, (e, C)), scale=scale)
