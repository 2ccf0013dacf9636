"""The seed's interfaces under their own names and signatures, and the kernel object that composes them.

Names, parameter order, types and defaults carry over from the seed (vLLM's modular MoE kernel, early 2026); what each
parameter must mean is docs/contract.md, S01-S25. Letters here are the seed's own: M tokens, K hidden, N = w1.size(1).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from moeproof.reference.contract.checks import check_forward, check_workspaces
from moeproof.reference.contract.errors import ContractError, check

Prepared = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
"""What `prepare` returns: (a1q, a1q_scale, expert_num_tokens, expert_topk_ids, expert_topk_weights)."""


def moe_problem_size(
    a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, topk_ids: torch.Tensor
) -> tuple[int, int, int, int, int]:
    """(E, M, N, K, topk) of a call: E experts here, M rows, N = w1.size(1), K hidden, topk slots per token.

    E and N come from w1 and K from the activations: packed weights (int4, fp4) make trailing weight dims unusable.
    `a1` is (M, K), or (E, max_tokens, K) in the batched layout; packed activations (fp4, two to a byte) have K/2 columns.
    Raises ContractError naming the tensor that disagrees.
    """
    check(w1.dim() == 3, f"w1 has {w1.dim()} dims, must have 3: (E, N, K)")
    check(w2.dim() == 3, f"w2 has {w2.dim()} dims, must have 3: (E, K, I)")
    check(topk_ids.dim() == 2, f"topk_ids has {topk_ids.dim()} dims, must have 2: (tokens, slots)")
    check(w1.size(0) == w2.size(0), f"w1 holds {w1.size(0)} experts and w2 {w2.size(0)}; they must be equal")
    E, N = w1.size(0), w1.size(1)
    if a1.dim() == 2:
        check(
            topk_ids.size(0) == a1.size(0),
            f"topk_ids has {topk_ids.size(0)} rows and a1 {a1.size(0)}; they must be equal",
        )
        M = a1.size(0)
    elif a1.dim() == 3:
        check(a1.size(0) == E, f"a1 is batched for {a1.size(0)} experts but w1 holds {E}; they must be equal")
        M = a1.size(1)
    else:
        raise ContractError(f"a1 has {a1.dim()} dims, must have 2 (tokens, K) or 3 (experts, max_tokens, K)")
    K = a1.size(-1)
    if a1.dtype == torch.uint8 and w2.size(1) == 2 * K:
        K = 2 * K
    check(w2.size(1) == K, f"w2 has {w2.size(1)} output columns and a1 {K} columns; they must be equal")
    return E, M, N, K, topk_ids.size(1)


_moe_problem_size = moe_problem_size
"""The seed's own name."""


class FusedMoEPrepareAndFinalize(ABC):
    """[Quantize-Dispatch] and [Combine]: brings rows to the experts and their results back."""

    @abstractmethod
    def prepare(
        self,
        a1: torch.Tensor,
        a1_scale: torch.Tensor | None,
        a2_scale: torch.Tensor | None,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> Prepared:
        """Quantise and dispatch `a1` (M, K).

        `num_experts` is the global count. Returns (a1q, a1q_scale, expert_num_tokens int32 (local experts,),
        expert_topk_ids, expert_topk_weights); the last two, where not None, replace the originals for `apply`.
        No input is modified. With `apply_router_weight_on_input` (one slot only) the weight multiplies before quantising.
        """

    @abstractmethod
    def finalize(
        self,
        output: torch.Tensor,
        fused_expert_output: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Weigh, reduce and bring home: write every row of `output` (M, K) in place.

        `fused_expert_output` is unweighted and unreduced: (M, topk, K), or batched (e, max_tokens, K). Weights are
        applied here exactly once, or not at all when they were applied on the input. A slot with id -1 contributes 0,
        even where its weight is NaN. Called on every rank, also when it dispatched or received nothing.
        """

    @abstractmethod
    def topk_indices_dtype(self) -> torch.dtype | None:
        """The dtype in which ids must arrive, None for any."""

    @abstractmethod
    def max_num_tokens_per_rank(self) -> int | None:
        """Hard bound of tokens on any rank, None for none; more must raise before any collective."""

    def abandon(self, reason: str) -> None:
        """This rank cannot go on with the call: release the ranks that wait for it in prepare or finalize, with the reason.

        Called by the kernel object where arguments are refused before prepare, and where the experts raise. On one rank
        nobody waits.
        """
        return

    def settle(self) -> None:
        """Wait for what the last call left running on a device, and raise ContractError where that failed.

        For implementations whose calls return before anybody can know: kernels that wait for other ranks. Not called by the
        kernel object, which waits for nothing. The default has nothing to say.
        """
        return


class FusedMoEPermuteExpertsUnpermute(ABC):
    """[Permute-Experts-Unpermute]: both GEMMs and the activation between them."""

    @abstractmethod
    def workspace_shapes(
        self, a: torch.Tensor, aq: torch.Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        """(elements of workspace13, elements of workspace2, dtype).

        workspace13 holds GEMM1's and then GEMM2's output, workspace2 the activation's. `apply` touches nothing beyond
        these elements and does not depend on what they held.
        """

    def activation(self, activation: str, output: torch.Tensor, input: torch.Tensor) -> None:
        """output (.., I) = act(input[.., :I]) * input[.., I:]: packed halves, gate first. `silu` or `gelu` (erf).

        Raises ContractError (a ValueError) for any other name or where widths disagree.
        """
        check(
            output.size(-1) * 2 == input.size(-1),
            f"activation output has {output.size(-1)} columns and input {input.size(-1)}; input must have twice as many",
        )
        gate, up = input.float().chunk(2, dim=-1)
        if activation == "silu":
            gate = torch.nn.functional.silu(gate)
        elif activation == "gelu":
            gate = torch.nn.functional.gelu(gate)
        else:
            raise ContractError(f"activation '{activation}' is not known; allowed: silu, gelu")
        output.copy_(gate * up)

    @abstractmethod
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
        """Unweighted, unreduced expert outputs: (M, topk, K), or (e, max_tokens, K) in the batched layout.

        `w1` (e, N, K) and `w2` (e, K, I) are local, `topk_ids` global. A slot whose id is -1 or maps to -1 gives 0.
        """


class FusedMoEModularKernel(torch.nn.Module):
    """prepare -> apply -> finalize. One instance serves one layer."""

    def __init__(self, prepare_finalize: FusedMoEPrepareAndFinalize, fused_experts: FusedMoEPermuteExpertsUnpermute) -> None:
        super().__init__()
        self.prepare_finalize = prepare_finalize
        self.fused_experts = fused_experts

    def forward(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        inplace: bool = False,
        activation: str = "silu",
        global_num_experts: int = -1,
        expert_map: torch.Tensor | None = None,
        w1_scale: torch.Tensor | None = None,
        w2_scale: torch.Tensor | None = None,
        w1_zp: torch.Tensor | None = None,
        w2_zp: torch.Tensor | None = None,
        a1_scale: torch.Tensor | None = None,
        a2_scale: torch.Tensor | None = None,
        apply_router_weight_on_input: bool = False,
    ) -> torch.Tensor:
        """One MoE layer call: (M, K) -> (M, K) in hidden_states' dtype; hidden_states itself when `inplace`.

        `global_num_experts` -1 means w1.size(0). Raises ContractError before any launch or collective where arguments
        disagree, naming the tensor, what it is and what is allowed.
        """
        if global_num_experts == -1:
            global_num_experts = w1.size(0)
        self.check(
            hidden_states,
            w1,
            w2,
            topk_weights,
            topk_ids,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
        )
        output = hidden_states if inplace else torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        prepared = self.prepare_finalize.prepare(
            hidden_states,
            a1_scale,
            a2_scale,
            topk_weights,
            topk_ids,
            global_num_experts,
            expert_map,
            apply_router_weight_on_input,
        )
        # Dispatched ids and weights, where there are some, replace the originals from here on.
        topk_ids = topk_ids if prepared[3] is None else prepared[3]
        topk_weights = topk_weights if prepared[4] is None else prepared[4]
        expert_output = self.run_experts(
            prepared,
            hidden_states,
            w1,
            w2,
            topk_ids,
            activation,
            global_num_experts,
            expert_map,
            w1_scale,
            w2_scale,
            w1_zp,
            w2_zp,
            a2_scale,
        )
        self.prepare_finalize.finalize(output, expert_output, topk_weights, topk_ids, apply_router_weight_on_input)
        return output

    def check(
        self,
        hidden_states: torch.Tensor,
        w1: torch.Tensor,
        w2: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        global_num_experts: int,
        expert_map: torch.Tensor | None,
        apply_router_weight_on_input: bool,
    ) -> None:
        """Raise ContractError where arguments disagree, and let the other ranks know."""
        try:
            check_forward(
                hidden_states,
                w1,
                w2,
                topk_weights,
                topk_ids,
                global_num_experts,
                expert_map,
                apply_router_weight_on_input,
                self.prepare_finalize.topk_indices_dtype(),
                self.prepare_finalize.max_num_tokens_per_rank(),
            )
        except ContractError as error:
            self.prepare_finalize.abandon(str(error))
            raise

    def run_experts(
        self,
        prepared: Prepared,
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
        a2_scale: torch.Tensor | None,
    ) -> torch.Tensor:
        """What finalize gets: `apply` of the prepared rows in fresh workspaces. `hidden_states` are this rank's own tokens."""
        a1q, a1q_scale, expert_num_tokens, _, _ = prepared
        if a1q.numel() == 0:
            # Nothing arrived here. finalize is still called: it may be a collective that other ranks wait in.
            return torch.empty_like(a1q, dtype=hidden_states.dtype)
        try:
            _, M, N, K, topk = moe_problem_size(a1q, w1, w2, topk_ids)
            elements13, elements2, dtype = self.fused_experts.workspace_shapes(
                hidden_states, a1q, M, N, K, topk, global_num_experts
            )
            workspace13 = torch.empty(elements13, device=hidden_states.device, dtype=dtype)
            workspace2 = torch.empty(elements2, device=hidden_states.device, dtype=dtype)
            check_workspaces(workspace13, workspace2)
            return self.fused_experts.apply(
                a1q,
                w1,
                w2,
                topk_ids,
                activation,
                global_num_experts,
                expert_map,
                w1_scale,
                w2_scale,
                w1_zp,
                w2_zp,
                a1q_scale,
                a2_scale,
                workspace13,
                workspace2,
                expert_num_tokens,
            )
        except Exception as error:
            self.prepare_finalize.abandon(f"{type(error).__name__} in the experts: {error}")
            raise
