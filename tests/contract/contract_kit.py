"""What every contract test shares: the implementations, tiny exact inputs, and the expected values as plain loops.

The loops are Python over tokens and slots in float64 and import nothing of the oracle. Most inputs are saturated (gates are
multiples of 128, small integers elsewhere), so that float32 arithmetic is exact in any order and the answer must match bit
for bit. No two sizes are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.reference.contract import (
    Candidate,
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
    Inputs,
    Pair,
    Problem,
    RankPair,
)
from moeproof.reference.eager.candidates import candidates as eager_candidates

Tensor = torch.Tensor
DEVICE = modes.default_device()
NAN = float("nan")
SIZES: dict[str, Any] = {"T": 5, "H": 20, "I": 12, "E": 7, "K": 3}


def _collect() -> list[Candidate | Pair]:
    found = [c for c in eager_candidates() if not isinstance(c, RankPair)]
    if modes.has_triton():
        from moeproof.optimized.candidates import candidates as optimized_candidates

        found += [c for c in optimized_candidates() if not isinstance(c, RankPair)]
    runs = [c for c in found if modes.cannot_run(c.backend, DEVICE) is None]
    # Candidates of quantised schemes only have tests of their own.
    return [c for c in runs if c.supports(Problem(**SIZES, layout=getattr(c, "layout", "standard"))) is None]


ALL = _collect()
PAIRS = [c for c in ALL if isinstance(c, Pair)]
LAYERS = [c for c in ALL if isinstance(c, Candidate) and "out" in c.shows]
ROUTERS = [c for c in ALL if isinstance(c, Candidate) and "topk_ids" in c.shows]


@dataclass(frozen=True)
class Crossed:
    """One pair's prepare/finalize with any pair's experts of the same layout."""

    front: Pair
    back: Pair

    @property
    def layout(self) -> str:
        return self.front.layout

    def __str__(self) -> str:
        return self.front.name if self.front is self.back else f"{self.front.name}+{self.back.name}"

    def kernel(self, inputs: Inputs) -> FusedMoEModularKernel:
        return FusedMoEModularKernel(self.front.prepare_finalize(inputs), self.back.experts(inputs))


CROSSED = [Crossed(front, back) for front in PAIRS for back in PAIRS if front.layout == back.layout]
every_pair = pytest.mark.parametrize("pair", CROSSED, ids=str)
"""Every prepare/finalize with every experts class of its layout."""
every_shipped_pair = pytest.mark.parametrize("pair", [c for c in CROSSED if c.front is c.back], ids=str)
every_part = pytest.mark.parametrize("part", PAIRS, ids=lambda p: p.name)
"""One half alone."""
every_router = pytest.mark.parametrize("router", ROUTERS, ids=lambda c: c.name)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda c: c.name)


def case(layout: str = "standard", *, values: str = "sat", routing: str = "uniform", seed: int = 0, **fields: Any) -> Inputs:
    """Inputs of a small case; exact end to end unless `values` says otherwise."""
    strided = fields.pop("strided", False)
    problem = Problem(**{**SIZES, "layout": layout, **fields})
    return make_inputs(Case(problem, values=values, routing=routing, seed=seed, strided=strided), DEVICE)


def with_ids(inputs: Inputs, ids: list[list[int]], weights: list[list[float]] | None = None) -> Inputs:
    """The same inputs with a hand-written routing; weights 1, 2, 4 .. by slot unless given."""
    topk_ids = torch.tensor(ids, dtype=torch.int32, device=DEVICE)
    topk_weights = torch.tensor([[2.0**k for k in range(len(row))] for row in ids] if weights is None else weights)
    return inputs.map({"topk_ids": topk_ids, "topk_weights": topk_weights.float().to(DEVICE)})


# The expected values.


def act64(g: float, u: float, name: str = "silu") -> float:
    """silu, gelu (erf) or their tanh form of g, times u; relu without u. Plain math."""
    if name.startswith("relu"):
        return max(g, 0.0)
    if name.startswith("silu"):
        return g * u / (1.0 + math.exp(-g)) if g > -700 else 0.0
    return 0.5 * g * math.erfc(-g / math.sqrt(2.0)) * u


def local_of(inputs: Inputs, expert: int) -> int:
    """Local index of a global id, -1 where it is not routed or lives elsewhere."""
    if not 0 <= expert < inputs.problem.weight_experts:
        return -1
    return expert if inputs.expert_map is None else int(inputs.expert_map[expert])


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype).double()


def expected_slots(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(h (T, K, I), y (T, K, H)) in float64, rounded to the dtype after every stage; zeros where a slot is not live."""
    p = inputs.problem
    dtype = p.fmt.dtype
    x, w1, w2 = (t.double().cpu() for t in (inputs.hidden_states, inputs.w1, inputs.w2))
    T, K = inputs.topk_ids.shape
    h, y = torch.zeros(T, K, p.I, dtype=torch.float64), torch.zeros(T, K, p.hidden, dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            e = local_of(inputs, int(inputs.topk_ids[t, k]))
            if e < 0:
                continue
            row = x[t]
            if p.weight_on_input:
                row = rounded(row * float(inputs.topk_weights[t, k]), dtype)
            a = w1[e] @ row + (0 if inputs.b1 is None else inputs.b1[e].double().cpu())
            a = rounded(a, dtype).tolist()
            if not p.act.gated:
                hidden = [act64(g, 1.0, p.act.name) for g in a]
            elif p.act.interleaved:
                hidden = [act64(a[2 * i], a[2 * i + 1], p.act.name) for i in range(p.I)]
            else:
                hidden = [act64(a[i], a[p.I + i], p.act.name) for i in range(p.I)]
            h[t, k] = rounded(torch.tensor(hidden, dtype=torch.float64), dtype)
            y[t, k] = rounded(w2[e] @ h[t, k] + (0 if inputs.b2 is None else inputs.b2[e].double().cpu()), dtype)
    return h, y


def expected_sum(inputs: Inputs, y: Tensor) -> Tensor:
    """float64 (T, H): the weighted sum of y over live slots; the plain sum where the weight was on the input."""
    T, K = inputs.topk_ids.shape
    out = torch.zeros(T, y.shape[2], dtype=torch.float64)
    for t in range(T):
        for k in range(K):
            if local_of(inputs, int(inputs.topk_ids[t, k])) >= 0:
                w = 1.0 if inputs.problem.weight_on_input else float(inputs.topk_weights[t, k])
                out[t] += w * y[t, k]
    return out


def expected_out(inputs: Inputs) -> Tensor:
    """(T, H) in the problem's dtype."""
    return expected_sum(inputs, expected_slots(inputs)[1]).to(inputs.problem.fmt.dtype)


# Calls.


def forward(kernel: FusedMoEModularKernel, inputs: Inputs, **changes: Any) -> Tensor:
    """FusedMoEModularKernel.forward on these inputs, with arguments replaced."""
    p = inputs.problem
    arguments: dict[str, Any] = {
        "hidden_states": inputs.hidden_states,
        "w1": inputs.w1,
        "w2": inputs.w2,
        "topk_weights": inputs.topk_weights,
        "topk_ids": inputs.topk_ids,
        "inplace": p.inplace,
        "activation": str(p.act),
        "global_num_experts": p.weight_experts,
        "expert_map": inputs.expert_map,
        "apply_router_weight_on_input": p.weight_on_input,
    }
    return kernel(**(arguments | changes))


def prepare(pf: FusedMoEPrepareAndFinalize, inputs: Inputs, **changes: Any) -> tuple[Tensor, Any, Any, Any, Any]:
    p = inputs.problem
    arguments: dict[str, Any] = {
        "a1": inputs.hidden_states,
        "a1_scale": None,
        "a2_scale": None,
        "topk_weights": inputs.topk_weights,
        "topk_ids": inputs.topk_ids,
        "num_experts": p.weight_experts,
        "expert_map": inputs.expert_map,
        "apply_router_weight_on_input": p.weight_on_input,
    }
    return pf.prepare(**(arguments | changes))


def slot_rows(inputs: Inputs) -> tuple[list[tuple[int, int, int, int]], list[int]]:
    """Of the batched layout: (token, slot, local expert, position) of every live slot in slot order, and the counts."""
    rows, counts = [], [0] * inputs.w1.size(0)
    for t in range(inputs.topk_ids.size(0)):
        for k in range(inputs.topk_ids.size(1)):
            e = local_of(inputs, int(inputs.topk_ids[t, k]))
            if e >= 0:
                rows.append((t, k, e, counts[e]))
                counts[e] += 1
    return rows, counts


def batched(inputs: Inputs, values_TKA: Tensor, fill: float = NAN) -> tuple[Tensor, Tensor]:
    """(rows (e, C, A) in the problem's dtype, counts int32 (e,)) of canonical values (T, K, A), by plain loops."""
    p = inputs.problem
    rows, counts = slot_rows(inputs)
    shape = (inputs.w1.size(0), p.rows_per_expert, values_TKA.shape[2])
    out = torch.full(shape, fill, dtype=p.fmt.dtype, device=DEVICE)
    for t, k, e, i in rows:
        out[e, i] = values_TKA[t, k].to(out.dtype)
    return out, torch.tensor(counts, dtype=torch.int32, device=DEVICE)


def canonical(inputs: Inputs, rows_eCA: Tensor) -> Tensor:
    """(T, K, A) of batched rows; zeros where a slot is not live."""
    out = torch.zeros(*inputs.topk_ids.shape, rows_eCA.shape[2], dtype=rows_eCA.dtype)
    for t, k, e, i in slot_rows(inputs)[0]:
        out[t, k] = rows_eCA[e, i].cpu()
    return out


@dataclass
class Applied:
    """What a direct `apply` returned, and the workspaces it used."""

    y: Tensor
    """(T, K, H) canonical."""
    raw: Tensor
    workspace13: Tensor
    workspace2: Tensor


def apply(
    part: Pair,
    inputs: Inputs,
    fill: Callable[[Tensor], object] = lambda t: t.fill_(NAN),
    padding: float = NAN,
    **changes: Any,
) -> Applied:
    """experts.apply on these inputs, in the part's layout, with filled workspaces. Batched rows come from plain loops."""
    p = inputs.problem
    experts: FusedMoEPermuteExpertsUnpermute = part.experts(inputs)
    aq, counts = inputs.hidden_states, None
    if part.layout == "batched":
        rows = inputs.hidden_states[:, None].expand(*inputs.topk_ids.shape, p.H)
        aq, counts = batched(inputs, rows, padding)
    M = aq.size(-2)
    n13, n2, dtype = experts.workspace_shapes(
        inputs.hidden_states, aq, M, p.N, p.hidden, inputs.topk_ids.size(1), p.weight_experts
    )
    workspace13, workspace2 = (torch.empty(n, dtype=dtype, device=DEVICE) for n in (n13, n2))
    fill(workspace13)
    fill(workspace2)
    arguments: dict[str, Any] = {
        "hidden_states": aq,
        "w1": inputs.w1,
        "w2": inputs.w2,
        "topk_ids": inputs.topk_ids,
        "activation": str(p.act),
        "global_num_experts": p.weight_experts,
        "expert_map": inputs.expert_map,
        "w1_scale": None,
        "w2_scale": None,
        "w1_zp": None,
        "w2_zp": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": workspace13,
        "workspace2": workspace2,
        "expert_num_tokens": counts,
    }
    raw = experts.apply(**(arguments | changes))
    y = canonical(inputs, raw) if part.layout == "batched" else raw.cpu()
    return Applied(y, raw, workspace13, workspace2)


def same(got: Tensor, want: Tensor) -> None:
    """Equal element for element (-0 equals 0), naming the first difference."""
    got, want = got.detach().cpu(), want.detach().cpu()
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, want {tuple(want.shape)}"
    assert got.dtype == want.dtype, f"dtype {got.dtype}, want {want.dtype}"
    bad = ~(got == want)
    where = tuple(bad.nonzero()[0].tolist()) if bool(bad.any()) else ()
    assert not bad.any(), f"{int(bad.sum())} of {bad.numel()} differ, first at {where}: got {got[where]}, want {want[where]}"


def snapshot(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in inputs.tensors()}


def unchanged(inputs: Inputs, before: dict[str, Tensor]) -> None:
    """Every input tensor has the bytes it had."""
    for name, t in inputs.tensors():
        now, then = (x.contiguous().view(torch.uint8) for x in (t, before[name]))
        assert torch.equal(now, then), f"{name} was modified"


def payload(inputs: Inputs) -> Inputs:
    """Rows that say who they are: token t holds t + 1 in every column (exact in bf16 up to 256 tokens)."""
    x = torch.arange(1, inputs.topk_ids.size(0) + 1, device=DEVICE)[:, None].expand(-1, inputs.problem.H)
    return inputs.map({"hidden_states": x.to(inputs.problem.fmt.dtype).contiguous()})


def found(rows_eCH: Tensor, counts: Tensor) -> list[tuple[int, int]]:
    """Sorted (token, local expert) of every valid row that carries a payload."""
    return sorted((int(rows_eCH[e, i, 0]) - 1, e) for e, count in enumerate(counts.tolist()) for i in range(count))


def finalize(
    part: Pair, inputs: Inputs, y_TKH: Tensor, output: Tensor | None = None, topk_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output, the fused_expert_output that was passed) of finalize after its prepare, on a NaN-filled output.

    y must be a function of (token, expert): rows of duplicates cannot be told apart. Where the layout has rows without a
    slot they hold NaN.
    """
    p = inputs.problem
    pf = part.prepare_finalize(inputs)
    flagged = p.weight_on_input
    rows, _, counts, _, _ = prepare(pf, payload(inputs), apply_router_weight_on_input=False)
    y = y_TKH.to(p.fmt.dtype).to(DEVICE)
    if part.layout == "batched":
        y_eCH = torch.full((*rows.shape[:2], y.size(2)), NAN, dtype=y.dtype, device=DEVICE)
        for t in range(y.size(0)):
            for k in range(y.size(1)):
                e = local_of(inputs, int(inputs.topk_ids[t, k]))
                for i in range(int(counts[e]) if e >= 0 else 0):
                    if int(rows[e, i, 0]) == t + 1:
                        y_eCH[e, i] = y[t, k]
        y = y_eCH
    if output is None:
        output = torch.full((inputs.topk_ids.size(0), y.size(-1)), NAN, dtype=y.dtype, device=DEVICE)
    weights = inputs.topk_weights if topk_weights is None else topk_weights
    assert pf.finalize(output, y, weights, inputs.topk_ids, flagged) is None
    return output, y


def y_of(inputs: Inputs, columns: int, seed: int = 0) -> Tensor:
    """float64 (T, K, columns) of small integers that depend on token and expert only; garbage where a slot is dead."""
    generator = torch.Generator().manual_seed(seed)
    table = torch.randint(-8, 9, (inputs.topk_ids.size(0), inputs.problem.weight_experts, columns), generator=generator)
    y = torch.full((*inputs.topk_ids.shape, columns), NAN, dtype=torch.float64)
    for t, k, _, _ in slot_rows(inputs)[0]:
        y[t, k] = table[t, int(inputs.topk_ids[t, k])].double()
    return y
