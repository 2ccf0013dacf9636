"""The seed's [Permute-Experts-Unpermute] in both layouts: align, GEMM1, activation, GEMM2 inside the two workspaces."""

from __future__ import annotations

import torch

from moeproof.optimized.activation import activate
from moeproof.optimized.align import Alignment, align
from moeproof.optimized.grouped_gemm import batched_gemm, grouped_gemm
from moeproof.optimized.prepare_finalize import check_unquantised
from moeproof.optimized.slots import Slots, clear_dead
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.checks import check_workspaces
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute, moe_problem_size


class _TritonExperts(FusedMoEPermuteExpertsUnpermute):
    """What both layouts share: biases and activation parameters, for which `apply` has no room.

    b1 (e, N) and b2 (e, K) are the experts' biases. `act`, where given, fixes the activation and its parameters; `apply` is
    then called with its name. Without it, `apply`'s string is parsed in full (`silu:limit=7`).
    """

    def __init__(self, b1: torch.Tensor | None = None, b2: torch.Tensor | None = None, act: Activation | None = None) -> None:
        self.b1 = b1
        self.b2 = b2
        self.act = act

    def _activation(self, activation: str) -> Activation:
        asked = Activation.parse(activation)
        if self.act is None:
            return asked
        check(
            asked == self.act or activation == self.act.name,
            f"activation '{activation}' was asked of experts that were made for '{self.act}'",
        )
        return self.act

    def _intermediate(self, N: int, act: Activation | None) -> int:
        """Columns of the activation's output. N where the activation is not known yet, which is enough for any."""
        return N if act is None else N // act.width_in(1)

    def _workspaces(self, rows: int, N: int, K: int) -> tuple[int, int]:
        return rows * max(N, K), rows * self._intermediate(N, self.act)

    def _views(
        self, workspace13: torch.Tensor, workspace2: torch.Tensor, shape: tuple[int, int], w1: torch.Tensor, w2: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """gate_up, h and y of `shape` rows. y shares its storage with gate_up, which is dead when y is written."""
        check_workspaces(workspace13, workspace2)
        rows, N, K = shape[0] * shape[1], w1.size(1), w2.size(1)
        I = w2.size(2)  # noqa: E741  (the project's letter)
        for name, space, needed in (("workspace13", workspace13, rows * max(N, K)), ("workspace2", workspace2, rows * I)):
            check(space.numel() >= needed, f"{name} has {space.numel()} elements, this call needs {needed}")
            check(space.dtype == w1.dtype, f"{name} is {space.dtype}, must be {w1.dtype}")
            check(space.is_contiguous(), f"{name} must be contiguous")
        gate_up = workspace13[: rows * N].view(*shape, N)
        return gate_up, workspace2[: rows * I].view(*shape, I), workspace13[: rows * K].view(*shape, K)


def _check_weights(w1: torch.Tensor, w2: torch.Tensor, act: Activation) -> None:
    check(
        w1.size(1) == act.width_in(w2.size(2)),
        f"w1 has {w1.size(1)} rows per expert and w2 {w2.size(2)} input columns; '{act}' needs {act.width_in(w2.size(2))} rows",
    )


class TritonExperts(_TritonExperts):
    """Standard layout: (M, K) in, (M, topk, K) out. Rows of slots that are not routed here are zeros."""

    def workspace_shapes(
        self, a: torch.Tensor, aq: torch.Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return *self._workspaces(M * topk, N, K), a.dtype

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        w1_scale: torch.Tensor | None,
        w2_scale: torch.Tensor | None,
        w1_zp: torch.Tensor | None,
        w2_zp: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        check_unquantised(
            w1_scale=w1_scale, w2_scale=w2_scale, w1_zp=w1_zp, w2_zp=w2_zp, a1q_scale=a1q_scale, a2_scale=a2_scale
        )
        check(hidden_states.dim() == 2, f"hidden_states has {hidden_states.dim()} dims; the standard layout has 2")
        e, M, _, K, topk = moe_problem_size(hidden_states, w1, w2, topk_ids)
        act = self._activation(activation)
        _check_weights(w1, w2, act)
        gate_up, h, y = self._views(workspace13, workspace2, (M, topk), w1, w2)
        slots = Slots(topk_ids, e if global_num_experts == -1 else global_num_experts, e, expert_map)
        run_experts(hidden_states, w1, w2, slots, act, gate_up, h, y, self.b1, self.b2)
        clear_dead(y.view(-1, K), slots)
        return y


def run_experts(
    x_TH: torch.Tensor,
    w1_eNH: torch.Tensor,
    w2_eHI: torch.Tensor,
    slots: Slots,
    act: Activation,
    gate_up_TKN: torch.Tensor,
    h_TKI: torch.Tensor,
    y_TKH: torch.Tensor,
    b1_eN: torch.Tensor | None = None,
    b2_eH: torch.Tensor | None = None,
) -> Alignment:
    """Align, both GEMMs and the activation, into contiguous (T, K, .) buffers. Rows of dead slots are not touched."""
    alignment = align(slots, rows_per_block(slots.count, slots.num_experts))
    gate_up, h, y = (buffer.flatten(0, 1) for buffer in (gate_up_TKN, h_TKI, y_TKH))
    grouped_gemm(x_TH, w1_eNH, gate_up, alignment, slots.K, b1_eN)
    activate(gate_up, h, act, slots=slots)
    grouped_gemm(h, w2_eHI, y, alignment, 1, b2_eH)
    return alignment


class TritonBatchedExperts(_TritonExperts):
    """Batched layout: (e, max_tokens, K) in and out. Rows beyond an expert's count are neither read nor written."""

    _gemm1 = _gemm2 = staticmethod(batched_gemm)
    _activate = staticmethod(activate)
    """Stages, which a subclass may take from elsewhere."""

    def workspace_shapes(
        self, a: torch.Tensor, aq: torch.Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return *self._workspaces(aq.size(0) * M, N, K), a.dtype

    def apply(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_ids: torch.Tensor,
        activation: str,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        w1_scale: torch.Tensor | None,
        w2_scale: torch.Tensor | None,
        w1_zp: torch.Tensor | None,
        w2_zp: torch.Tensor | None,
        a1q_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        workspace13: torch.Tensor,
        workspace2: torch.Tensor,
        expert_num_tokens: torch.Tensor | None,
    ) -> torch.Tensor:
        check_unquantised(
            w1_scale=w1_scale, w2_scale=w2_scale, w1_zp=w1_zp, w2_zp=w2_zp, a1q_scale=a1q_scale, a2_scale=a2_scale
        )
        check(hidden_states.dim() == 3, f"hidden_states has {hidden_states.dim()} dims; the batched layout has 3")
        check(expert_num_tokens is not None, "expert_num_tokens is None; the batched layout needs the counts")
        assert expert_num_tokens is not None
        e, C, _, _, _ = moe_problem_size(hidden_states, w1, w2, topk_ids)
        act = self._activation(activation)
        _check_weights(w1, w2, act)
        gate_up, h, y = self._views(workspace13, workspace2, (e, C), w1, w2)
        mean_rows = min(C, topk_ids.numel() // max(global_num_experts, e) + 1)
        self._gemm1(hidden_states, w1, gate_up, expert_num_tokens, self.b1, mean_rows)
        self._activate(gate_up.flatten(0, 1), h.flatten(0, 1), act, counts=expert_num_tokens)
        self._gemm2(h, w2, y, expert_num_tokens, self.b2, mean_rows)
        return y
