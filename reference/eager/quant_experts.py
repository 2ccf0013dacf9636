"""PERMUTE .. GEMM2 of quantised schemes as loops over experts, in the standard and in the batched layout.

QUANT1 came with the rows. GEMM1's and the activation's results are rounded to the problem's dtype and stored in the
workspaces, as the unquantised experts do; QUANT2 reads the stored h, and its codes and scales are kept for `taps`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import format_of
from moeproof.reference.contract.quant_checks import (
    as_received,
    check_activation,
    check_global,
    check_quantised,
    check_scale_values,
)
from moeproof.reference.contract.schemes import QuantScheme
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts, _Experts, _take
from moeproof.reference.eager.quantise import Matrix, activations, matmul, plain, quantise, weights
from moeproof.reference.eager.slots import local_ids

Tensor = torch.Tensor
Rows = list[tuple[Tensor, Tensor]]
"""For each local expert: its rows of the workspaces, and the rows of hidden_states that they read."""


class _QuantExperts(_Experts):
    """What both layouts share. Global scales have no argument in `apply`: they come with the constructor."""

    def __init__(
        self,
        scheme: QuantScheme,
        act: Activation | None = None,
        b1: Tensor | None = None,
        b2: Tensor | None = None,
        w1_global: Tensor | None = None,
        w2_global: Tensor | None = None,
        a1_scale: Tensor | None = None,
    ) -> None:
        """`a1_scale` is needed again here where it is the global scale of a two-level rule."""
        super().__init__(act, b1, b2)
        check(scheme.quantised, f"scheme {scheme.name} is unquantised: use LoopExperts or BatchedLoopExperts")
        self.scheme = scheme
        self.globals = {"w1": w1_global, "w2": w2_global}
        self.a1_scale = a1_scale
        self.kept: dict[str, Tensor] = {}
        self.shape = torch.Size()

    def _check_tensors(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        scales: Mapping[str, Tensor | None],
        dtype: torch.dtype,
        N: int,
        I: int,  # noqa: E741  (the project's letter)
    ) -> None:
        e, K = w1.size(0), w2.size(1)
        check(w2.size(0) == e, f"w1 holds {e} experts and w2 {w2.size(0)}; they must be equal")
        check_quantised(self.scheme, dtype, (e, N, K, I), w1, w2, **{n: t for n, t in scales.items() if n != "a1q_scale"})
        check_activation("a1q", self.scheme.a1, hidden_states, scales["a1q_scale"], K, dtype)
        for name, g in self.globals.items():
            check_global(f"{name}_global", self.scheme.w, g, e, w1.device)
        assert self.scheme.w is not None
        form = self.scheme.w.scale_format(format_of(dtype))
        for name in ("w1_scale", "w2_scale"):
            check_scale_values(name, scales[name], form)
        check_scale_values("a2_scale", scales["a2_scale"], format_of(torch.float32))

    def _weights(
        self, name: str, expert: int, w: Tensor, scale: Tensor | None, zp: Tensor | None, dtype: torch.dtype
    ) -> Matrix:
        g = self.globals[name]
        assert scale is not None and self.scheme.w is not None
        one = None if g is None else g[expert]
        return weights(w[expert], scale[expert], None if zp is None else zp[expert], one, self.scheme.w, dtype)

    def _quant2(self, h: Tensor, live: Tensor, a2_scale: Tensor | None, owner: Tensor) -> None:
        """QUANT2 of h (rows, I): rows that are not live count as zeros. `owner` (rows,) is each row's local expert."""
        q = self.scheme.a2
        self.kept = {"h": h.clone()}
        if q is None:
            return
        given = a2_scale
        if given is not None and given.dim() == 3:
            given = given.flatten()[owner.clamp(min=0)][:, None]
        rows = torch.where(live[:, None], h, 0)
        self.kept["hq"], self.kept["hs"] = quantise(rows, q, h.dtype, given)
        self.kept["g2"] = given if q.two_level and given is not None else torch.ones(1, 1)

    def taps(self) -> dict[str, Tensor]:
        """h, hq and hs of the last apply, in this layout's coordinates (reference.contract.candidate.Pair)."""
        if not self.kept:
            return {}
        shown: dict[str, Tensor] = {
            name: t.view(*self.shape, t.size(1))
            for name, t in self.kept.items()
            if name != "g2" and t.size(0) == self.shape.numel()
        }
        if self.scheme.a2 is not None and not self.scheme.a2.by_token:
            shown["hs"] = self.kept["hs"].view(1, 1, 1)
        return shown

    def _h_matrix(self, h: Tensor, rows: Tensor) -> Matrix:
        q = self.scheme.a2
        if q is None:
            return plain(h[rows])
        s, g = self.kept["hs"], self.kept["g2"]
        one = g[rows] if q.two_level else None
        return activations(self.kept["hq"][rows], s[rows] if q.by_token else s, q, h.dtype, one)

    def _x_matrix(self, xq: Tensor, xs: Tensor | None, rows: Tensor, expert: int, dtype: torch.dtype) -> Matrix:
        """`xs` (rows or 1, G), or (e, 1, 1) where the batched layout repeats one scale for every expert."""
        if self.scheme.a1 is None:
            return plain(xq[rows])
        assert xs is not None
        q = as_received(self.scheme.a1, xs)
        s = xs[rows] if q.by_token else xs[expert] if xs.dim() == 3 else xs
        return activations(xq[rows], s, q, dtype, self.a1_scale)

    def _run(
        self,
        xq: Tensor,
        w1: Tensor,
        w2: Tensor,
        activation: str,
        scales: Mapping[str, Tensor | None],
        xs: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        rows_of: Rows,
        total: int,
    ) -> Tensor:
        """y (total, K) as a view of workspace13. xq (rows, .) and xs are flat, whatever the layout was."""
        dtype, N, K = workspace13.dtype, w1.size(1), w2.size(1)
        assert self.scheme.w is not None
        I = w2.size(2) * self.scheme.w.format.per_byte  # noqa: E741  (the project's letter)
        act = self._spec(activation, N, I)
        gate_up = _take(workspace13, total, N, "workspace13", dtype)
        h = _take(workspace2, total, I, "workspace2", dtype)
        y = _take(workspace13, total, K, "workspace13", dtype)
        live = torch.zeros(total, dtype=torch.bool, device=h.device)
        owner = torch.full((total,), -1, device=h.device)
        for expert, (rows, source) in enumerate(rows_of):
            if not rows.numel():
                continue
            live[rows], owner[rows] = True, expert
            w = self._weights("w1", expert, w1, scales["w1_scale"], scales["w1_zp"], dtype)
            x = self._x_matrix(xq, xs, source, expert, dtype)
            gate_up[rows] = matmul(x, w, self._bias(self.b1, expert)).to(dtype)
            h[rows] = activate(gate_up[rows], act).to(dtype)
        self._quant2(h, live, scales["a2_scale"], owner)
        # From here on GEMM1's output is dead: y lies over it.
        for expert, (rows, _) in enumerate(rows_of):
            if rows.numel():
                w = self._weights("w2", expert, w2, scales["w2_scale"], scales["w2_zp"], dtype)
                y[rows] = matmul(self._h_matrix(h, rows), w, self._bias(self.b2, expert)).to(dtype)
        y[~live] = 0
        return y


class QuantLoopExperts(_QuantExperts):
    """Standard layout: rows (tokens, .) with their scales -> (tokens, slots, K). Slots not routed here are zeros."""

    workspace_shapes = LoopExperts.workspace_shapes

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
        """(tokens, slots, K), a view of workspace13."""
        check(
            hidden_states.dim() == 2 and topk_ids.dim() == 2 and topk_ids.size(0) == hidden_states.size(0),
            f"hidden_states is {tuple(hidden_states.shape)} and topk_ids {tuple(topk_ids.shape)}; both must have a row a token",
        )
        scales = {"w1_scale": w1_scale, "w2_scale": w2_scale, "w1_zp": w1_zp, "w2_zp": w2_zp, "a2_scale": a2_scale}
        width = _intermediate(self, w2)
        self._check_tensors(hidden_states, w1, w2, scales | {"a1q_scale": a1q_scale}, workspace13.dtype, w1.size(1), width)
        num_experts = w1.size(0) if global_num_experts == -1 else global_num_experts
        local_R = local_ids(topk_ids, num_experts, expert_map).reshape(-1)
        slots = topk_ids.size(1)
        found = [torch.nonzero(local_R == expert)[:, 0] for expert in range(w1.size(0))]
        rows_of = [(rows, rows // slots) for rows in found]
        total = local_R.numel()
        y = self._run(hidden_states, w1, w2, activation, scales, a1q_scale, workspace13, workspace2, rows_of, total)
        self.shape = topk_ids.shape
        return y.view(*self.shape, w2.size(1))


class QuantBatchedLoopExperts(_QuantExperts):
    """Batched layout: rows (e, max_tokens, .) with their scales -> (e, max_tokens, K)."""

    workspace_shapes = BatchedLoopExperts.workspace_shapes

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
        """(e, max_tokens, K), a view of workspace13. Rows beyond expert_num_tokens[e] are never read."""
        check(
            hidden_states.dim() == 3 and hidden_states.size(0) == w1.size(0),
            f"hidden_states is {tuple(hidden_states.shape)}, must be ({w1.size(0)} experts, max_tokens, hidden)",
        )
        check(
            expert_num_tokens is not None and tuple(expert_num_tokens.shape) == (w1.size(0),),
            f"expert_num_tokens must be ({w1.size(0)},): the batched layout needs the count of every local expert",
        )
        assert expert_num_tokens is not None
        scales = {"w1_scale": w1_scale, "w2_scale": w2_scale, "w1_zp": w1_zp, "w2_zp": w2_zp, "a2_scale": a2_scale}
        width = _intermediate(self, w2)
        self._check_tensors(hidden_states, w1, w2, scales | {"a1q_scale": a1q_scale}, workspace13.dtype, w1.size(1), width)
        e, C = hidden_states.shape[:2]
        rows_of = []
        for expert, count in enumerate(expert_num_tokens.tolist()):
            check(0 <= count <= C, f"expert_num_tokens[{expert}] is {count}, must be in [0, {C}], the rows of a region")
            rows = torch.arange(expert * C, expert * C + count, device=hidden_states.device)
            rows_of.append((rows, rows))
        flat = None
        if a1q_scale is not None:
            assert self.scheme.a1 is not None
            flat = a1q_scale.flatten(0, 1) if as_received(self.scheme.a1, a1q_scale).by_token else a1q_scale
        y = self._run(hidden_states.flatten(0, 1), w1, w2, activation, scales, flat, workspace13, workspace2, rows_of, e * C)
        self.shape = hidden_states.shape[:2]
        return y.view(*self.shape, w2.size(1))


def _intermediate(experts: _QuantExperts, w2: Tensor) -> int:
    """I, unpacked."""
    assert experts.scheme.w is not None
    return w2.size(2) * experts.scheme.w.format.per_byte
