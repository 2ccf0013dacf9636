"""PERMUTE .. GEMM2 as loops over experts, in the standard and in the batched layout. Unquantised.

Products accumulate in float32. Each stage's result is rounded once to the dtype of the activations and stored in the
workspace the contract gives it: GEMM1's and later GEMM2's in workspace13, the activation's in workspace2.
"""

from __future__ import annotations

import torch

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.checks import check_weights
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.modular import FusedMoEPermuteExpertsUnpermute
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.slots import check_unquantised, local_ids

Tensor = torch.Tensor


def matmul(x_RA: Tensor, w_BA: Tensor, bias_B: Tensor | None = None) -> Tensor:
    """float32 (R, B): x @ w^T (+ bias), operands of any floating dtype and stride."""
    y = x_RA.float() @ w_BA.float().T
    return y if bias_B is None else y + bias_B.float()


def _take(workspace: Tensor, rows: int, columns: int, name: str, dtype: torch.dtype) -> Tensor:
    """The first rows * columns elements of a flat workspace as a matrix."""
    check(
        workspace.dim() == 1 and workspace.dtype == dtype and workspace.numel() >= rows * columns,
        f"{name} is {workspace.dtype} {tuple(workspace.shape)}, must be flat {dtype} with at least {rows * columns} elements",
    )
    return workspace[: rows * columns].view(rows, columns)


class _Experts(FusedMoEPermuteExpertsUnpermute):
    """What both layouts share: the constructor's spec, the sizes of workspaces, the refusals."""

    def __init__(self, act: Activation | None = None, b1: Tensor | None = None, b2: Tensor | None = None) -> None:
        """`act`: the activation with its parameters; None takes what `apply` names. b1 (e, N), b2 (e, K)."""
        self.act = act
        self.b1 = b1
        self.b2 = b2

    def _width(self, N: int) -> int:
        """Columns of the activation's output for N of GEMM1's. Unknown activation: N, the larger case."""
        return N // 2 if self.act is not None and self.act.gated else N

    def _spec(self, activation: str, N: int, width: int) -> Activation:
        act = self.act
        if act is None:
            act = Activation.parse(activation)
        check(
            activation in (act.name, str(act)),
            f"activation '{activation}' asked for, but these experts were made for '{act}'; they must be equal",
        )
        check(
            act.width_in(width) == N,
            f"w1 has {N} rows per expert and w2 {width} input columns; activation '{act}' needs {act.width_in(width)} rows",
        )
        return act

    def _check(self, x: Tensor, w1: Tensor, w2: Tensor) -> None:
        check_weights(w1, w2, x.size(-1))
        check(x.dtype == w1.dtype, f"hidden_states is {x.dtype} and w1 {w1.dtype}; they must be equal")
        for name, bias, columns in (("b1", self.b1, w1.size(1)), ("b2", self.b2, w2.size(1))):
            shape = (w1.size(0), columns)
            check(
                bias is None or tuple(bias.shape) == shape,
                f"{name} is {() if bias is None else tuple(bias.shape)}, must be {shape}",
            )

    def _bias(self, bias: Tensor | None, expert: int) -> Tensor | None:
        return None if bias is None else bias[expert]


class LoopExperts(_Experts):
    """Standard layout: hidden_states (tokens, K) -> (tokens, slots, K).

    Row token * slots + slot of both workspaces belongs to that slot, so the activation's output can be read back from
    workspace2. Slots that are not routed here are never computed and come back as exact zeros.
    """

    def workspace_shapes(
        self, a: Tensor, aq: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        return M * topk * max(N, K), M * topk * self._width(N), a.dtype

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
        """(tokens, slots, K), a view of workspace13. `expert_num_tokens` says nothing that the ids do not."""
        scales = {"w1_scale": w1_scale, "w2_scale": w2_scale, "a1q_scale": a1q_scale, "a2_scale": a2_scale}
        check_unquantised(**scales, w1_zp=w1_zp, w2_zp=w2_zp)
        check(hidden_states.dim() == 2, f"hidden_states has {hidden_states.dim()} dims, must have 2: (tokens, hidden)")
        check(
            topk_ids.dim() == 2 and topk_ids.size(0) == hidden_states.size(0),
            f"topk_ids is {tuple(topk_ids.shape)}, must be ({hidden_states.size(0)}, slots)",
        )
        self._check(hidden_states, w1, w2)
        (T, slots), K, (num_local, N, _), I = topk_ids.shape, w2.size(1), w1.shape, w2.size(2)  # noqa: E741
        act = self._spec(activation, N, I)
        num_experts = num_local if global_num_experts == -1 else global_num_experts
        check(
            num_experts == num_local or expert_map is not None,
            f"global_num_experts={num_experts} but w1 holds {num_local} experts and there is no expert_map",
        )
        local_R = local_ids(topk_ids, num_experts, expert_map).reshape(-1)
        check(
            not bool((local_R >= num_local).any()),
            f"expert_map points at local expert {int(local_R.max()) if local_R.numel() else -1}, w1 holds {num_local}",
        )
        gate_up = _take(workspace13, T * slots, N, "workspace13", hidden_states.dtype)
        h = _take(workspace2, T * slots, I, "workspace2", hidden_states.dtype)
        y = _take(workspace13, T * slots, K, "workspace13", hidden_states.dtype)
        rows_of = [torch.nonzero(local_R == expert)[:, 0] for expert in range(num_local)]
        for expert, rows in enumerate(rows_of):
            if rows.numel():
                x = hidden_states[rows // slots]
                gate_up[rows] = matmul(x, w1[expert], self._bias(self.b1, expert)).to(h.dtype)
                h[rows] = activate(gate_up[rows], act).to(h.dtype)
        # From here on GEMM1's output is dead: y lies over it.
        y.zero_()
        for expert, rows in enumerate(rows_of):
            if rows.numel():
                y[rows] = matmul(h[rows], w2[expert], self._bias(self.b2, expert)).to(h.dtype)
        return y.view(T, slots, K)


class BatchedLoopExperts(_Experts):
    """Batched layout: hidden_states (e, max_tokens, K) -> the same shape.

    Only the first expert_num_tokens[e] rows of an expert are read, and only those of the result are written.
    """

    def workspace_shapes(
        self, a: Tensor, aq: Tensor, M: int, N: int, K: int, topk: int, num_experts: int
    ) -> tuple[int, int, torch.dtype]:
        # Local experts: num_experts is the global count.
        rows = aq.size(0) * M
        return rows * max(N, K), rows * self._width(N), a.dtype

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
        """(e, max_tokens, K), a view of workspace13. The rows are sorted already: ids and map are not looked at."""
        scales = {"w1_scale": w1_scale, "w2_scale": w2_scale, "a1q_scale": a1q_scale, "a2_scale": a2_scale}
        check_unquantised(**scales, w1_zp=w1_zp, w2_zp=w2_zp)
        check(
            hidden_states.dim() == 3 and hidden_states.size(0) == w1.size(0),
            f"hidden_states is {tuple(hidden_states.shape)}, must be ({w1.size(0)} experts, max_tokens, hidden)",
        )
        check(expert_num_tokens is not None, "expert_num_tokens is None; the batched layout needs the count of every expert")
        assert expert_num_tokens is not None
        check(
            tuple(expert_num_tokens.shape) == (w1.size(0),),
            f"expert_num_tokens is {tuple(expert_num_tokens.shape)}, must be ({w1.size(0)},): one count per local expert",
        )
        self._check(hidden_states, w1, w2)
        (num_local, C, K), N, I = hidden_states.shape, w1.size(1), w2.size(2)  # noqa: E741
        act = self._spec(activation, N, I)
        counts = [int(count) for count in expert_num_tokens]
        check(
            all(0 <= count <= C for count in counts),
            f"expert_num_tokens is {counts}; every count must be in [0, {C}], the rows of a region",
        )
        dtype = hidden_states.dtype
        gate_up = _take(workspace13, num_local * C, N, "workspace13", dtype).view(num_local, C, N)
        h = _take(workspace2, num_local * C, I, "workspace2", dtype).view(num_local, C, I)
        y = _take(workspace13, num_local * C, K, "workspace13", dtype).view(num_local, C, K)
        for expert, count in enumerate(counts):
            x = hidden_states[expert, :count]
            gate_up[expert, :count] = matmul(x, w1[expert], self._bias(self.b1, expert)).to(dtype)
            h[expert, :count] = activate(gate_up[expert, :count], act).to(dtype)
        # From here on GEMM1's output is dead: y lies over it.
        for expert, count in enumerate(counts):
            y[expert, :count] = matmul(h[expert, :count], w2[expert], self._bias(self.b2, expert)).to(dtype)
        return y
