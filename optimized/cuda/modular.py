"""The seed's [Dispatch], [Permute-Experts-Unpermute] and [Combine] in the standard layout, from any mix of stages."""

from __future__ import annotations

import torch

from moeproof.optimized.cuda import quant_stages, stages
from moeproof.optimized.cuda.quant_stages import QuantStages
from moeproof.optimized.cuda.stages import Stages
from moeproof.optimized.experts import TritonExperts, _check_weights
from moeproof.optimized.prepare_finalize import (
    Prepared,
    TritonNoEPPrepareFinalize,
    _check_weight_on_input,
    _rows,
    check_unquantised,
)
from moeproof.optimized.quant.experts import Levels, QuantExperts
from moeproof.optimized.quant.gemm import Rows
from moeproof.optimized.slots import Slots
from moeproof.optimized.tiles import rows_per_block
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import format_of
from moeproof.reference.contract.modular import moe_problem_size
from moeproof.reference.contract.quant_checks import check_static_scale
from moeproof.reference.contract.schemes import QuantScheme

Tensor = torch.Tensor


class StagedPrepareFinalize(TritonNoEPPrepareFinalize):
    """Rows stay where they are, and the experts gather them; with a scheme they are quantised first."""

    def __init__(self, chosen: Stages | QuantStages = stages.CUDA, scheme: QuantScheme | None = None) -> None:
        super().__init__()
        check(
            isinstance(chosen, QuantStages) == (scheme is not None),
            "a scheme goes with QuantStages, and none with Stages",
        )
        self.stages = chosen
        self.scheme = scheme

    def prepare(
        self,
        a1: Tensor,
        a1_scale: Tensor | None,
        a2_scale: Tensor | None,
        topk_weights: Tensor,
        topk_ids: Tensor,
        num_experts: int,
        expert_map: Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        _check_weight_on_input(apply_router_weight_on_input, topk_ids)
        self._map = (num_experts, expert_map)
        if isinstance(self.stages, Stages):
            check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
            return self.stages.weigh(a1, topk_weights) if apply_router_weight_on_input else a1, None, None, None, None
        assert self.scheme is not None and self.scheme.a1 is not None
        check_static_scale("a1_scale", self.scheme.a1, a1_scale, 0, a1.device)
        rows = self.stages.weigh(a1, topk_weights, topk_ids) if apply_router_weight_on_input else a1
        codes, scale = self.stages.quantise(rows, self.scheme.a1, format_of(a1.dtype), a1_scale)
        return codes, scale, None, None, None

    def finalize(
        self,
        output: Tensor,
        fused_expert_output: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        M, K = output.shape
        if not output.numel():
            return
        check(
            fused_expert_output.shape == (M, topk_ids.size(1), K),
            f"fused_expert_output is {tuple(fused_expert_output.shape)}, must be {(M, topk_ids.size(1), K)}",
        )
        num_experts, expert_map = self._map or (2**31 - 1, None)
        num_local = num_experts if expert_map is None else 2**31 - 1  # the map's own entries were checked by the experts
        slots = Slots(topk_ids, num_experts, num_local, expert_map)
        weighted = not apply_router_weight_on_input
        self.stages.combine(_rows(fused_expert_output), topk_weights, slots, output, weighted=weighted)


class StagedExperts(TritonExperts):
    """(M, K) in, (M, topk, K) out. Rows of slots that are not routed here are zeros."""

    def __init__(
        self, chosen: Stages = stages.CUDA, b1: Tensor | None = None, b2: Tensor | None = None, act: Activation | None = None
    ) -> None:
        super().__init__(b1, b2, act)
        self.stages = chosen

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
        check_unquantised(
            w1_scale=w1_scale, w2_scale=w2_scale, w1_zp=w1_zp, w2_zp=w2_zp, a1q_scale=a1q_scale, a2_scale=a2_scale
        )
        check(hidden_states.dim() == 2, f"hidden_states has {hidden_states.dim()} dims; the standard layout has 2")
        e, M, _, _, topk = moe_problem_size(hidden_states, w1, w2, topk_ids)
        act = self._activation(activation)
        _check_weights(w1, w2, act)
        views = self._views(workspace13, workspace2, (M, topk), w1, w2)
        gate_up, h, y = (view.flatten(0, 1) for view in views)
        slots = Slots(topk_ids, e if global_num_experts == -1 else global_num_experts, e, expert_map)
        alignment = self.stages.align(slots, rows_per_block(slots.count, slots.num_experts))
        self.stages.gemm1(hidden_states, w1, gate_up, alignment, topk, self.b1)
        self.stages.act(gate_up, h, act, slots=slots)
        self.stages.gemm2(h, w2, y, alignment, 1, self.b2)
        self.stages.clear(y, slots)
        return views[2]


class StagedQuantExperts(QuantExperts):
    """Codes (M, K) in, (M, topk, K) out. Rows of slots that are not routed here are zeros."""

    def __init__(
        self,
        scheme: QuantScheme,
        chosen: QuantStages = quant_stages.CUDA,
        b1: Tensor | None = None,
        b2: Tensor | None = None,
        act: Activation | None = None,
        keep_h: bool = False,
    ) -> None:
        super().__init__(scheme, Levels(), b1, b2, act, keep_h)
        self.stages = chosen

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
        act, dtype, q = self._activation(activation), format_of(workspace13.dtype), self.scheme.a2
        assert q is not None
        scales = (w1_scale, w2_scale, w1_zp, w2_zp, a1q_scale, a2_scale)
        x, first, second = self._operands(hidden_states, w1, w2, topk_ids, act, scales, workspace13.dtype)
        e, M, N, K, topk = moe_problem_size(hidden_states, w1, w2, topk_ids)
        gate_up, h, into, y = self._buffers(workspace13, workspace2, M * topk, N, K, N // act.width_in(1))
        slots = Slots(topk_ids, e if global_num_experts == -1 else global_num_experts, e, expert_map)
        alignment = self.stages.align(slots, rows_per_block(slots.count, slots.num_experts))
        self.stages.gemm1(x, first, gate_up, alignment, topk, dtype)
        codes, scale = self.stages.requantise(gate_up, q, dtype, a2_scale, act=act, slots=slots, h_RI=h, into=into)
        rows = Rows(codes, q, scale)
        self.stages.gemm2(rows, second, y, alignment, 1, dtype)
        self.stages.clear(y, slots)
        self.last = (h, rows, (M, topk))
        return y.view(M, topk, K)
