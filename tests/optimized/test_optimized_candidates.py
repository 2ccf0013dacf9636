"""The candidates as they are handed to the harness: every tensor they show, on every option they say they support."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from plain_layer import DEVICE, activation, check_close, local_index, normal, products, random_ids, weighted_sum
from plain_layer import route as plain_route

from moeproof.optimized import layer, torch_grouped
from moeproof.optimized.candidates import candidates as all_candidates
from moeproof.reference.contract import Candidate, Inputs, Pair, Problem, RankPair, expert_map

Tensor = torch.Tensor
PROBLEMS = [
    "T=9,H=40,I=24,E=5,K=3",
    "T=9,H=40,I=24,E=5,K=3,dtype=fp32,act=swigluoai,storage=KN,scale_on_sum=2.5",
    "T=7,H=32,I=16,E=8,K=1,dtype=fp16,act=gelu,weight_on_input=1,inplace=1",
    "T=9,H=40,I=24,E=5,K=2,dtype=fp32,shared=20,shared_gate=1,scale_on_sum=2,act=silu:limit=1",
    "T=9,H=40,I=24,E=6,K=3,dtype=fp32,router=softmax:bias:zero_experts=4:scale=6",
    "T=9,H=40,I=24,E=5,K=3,dtype=fp32,router=sigmoid:renorm=sum:fused_shared=2:scale=2.5,act=relu2_no_mul",
    "T=9,H=40,I=24,E=7,K=3,ep=2,ep_rank=1,placement=round_robin,router=sigmoid:bias:renorm=sum",
    "T=1,H=16,I=8,E=60,K=12,dtype=fp32,router=softmax_topk",
    "T=0,H=16,I=8,E=5,K=2,router=sqrtsoftplus:table",
]
BIASED = ["T=9,H=40,I=24,E=5,K=3,expert_bias=1,act=swigluoai", "T=6,H=17,I=11,E=3,K=2,dtype=fp16,expert_bias=1,act=situ:beta=4"]


def candidates() -> list[Candidate | Pair]:
    """Those for one rank."""
    return [c for c in all_candidates() if not isinstance(c, RankPair)]


def problem(line: str) -> Problem:
    return Problem.from_options(dict(part.split("=", 1) for part in line.split(",")))


def make(p: Problem) -> Inputs:
    """Random tensors of a problem; ids with duplicates, -1 and identity experts, NaN weights where the id is -1."""
    dtype, r, e = p.fmt.dtype, p.router, len(p.local)
    ids = random_ids(1, p.T, p.slots, p.weight_experts + r.zero_experts)
    if r.fused_shared:
        ids[:, p.K :] = torch.arange(p.E, p.weight_experts, device=DEVICE)
    mapping = expert_map(p.weight_experts, p.ep, p.ep_rank, p.placement)

    def weight(seed: int, rows: int, cols: int) -> Tensor:
        w = normal(seed, e, rows, cols, dtype=dtype, scale=cols**-0.5)
        return w if p.storage == "NK" else w.transpose(1, 2).contiguous().transpose(1, 2)

    return Inputs(
        problem=p,
        hidden_states=normal(2, p.T, p.H, dtype=dtype),
        topk_ids=ids,
        topk_weights=torch.where(ids < 0, torch.nan, normal(3, p.T, p.slots)),
        w1=weight(4, p.N, p.H),
        w2=weight(5, p.H, p.I),
        b1=normal(6, e, p.N, dtype=dtype) if p.expert_bias else None,
        b2=normal(7, e, p.H, dtype=dtype) if p.expert_bias else None,
        expert_map=None if mapping is None else mapping.to(DEVICE),
        logits=normal(8, p.T, p.routed_ids),
        correction_bias=normal(9, p.routed_ids) if r.bias else None,
        table_ids=random_ids(10, p.T, p.K, p.E, dead=0.0) if r.table else None,
        shared_w1=normal(11, p.act.width_in(p.shared), p.H, dtype=dtype, scale=p.H**-0.5) if p.shared else None,
        shared_w2=normal(12, p.H, p.shared, dtype=dtype, scale=p.shared**-0.5) if p.shared else None,
        shared_gate=normal(13, p.H, dtype=dtype, scale=p.H**-0.5) if p.shared_gate else None,
    )


def check_stages(x_TH: Tensor, inputs: Inputs, shown: dict[str, Tensor]) -> None:
    """Each stage against float64 on the candidate's own upstream tensors; `x_TH` is the input before the call."""
    p = inputs.problem
    local = local_index(inputs.topk_ids, p.weight_experts, inputs.expert_map)
    live = torch.tensor(local, device=DEVICE).view(p.T, p.slots) >= 0
    rows = x_TH[:, None].expand(p.T, p.slots, p.H)
    weights: Tensor | None = torch.where(live, inputs.topk_weights, 0.0)
    if p.weight_on_input:
        rows, weights = (rows.double() * weights.double()[:, :, None]).to(x_TH.dtype), None  # type: ignore[union-attr]
    for name, source, w, b in (("gate_up", rows, inputs.w1, inputs.b1), ("y", shown["h"], inputs.w2, inputs.b2)):
        want, magnitude = products(source, w, local, b)
        check_close(shown[name][live], want[live], magnitude[live])
    h = activation(shown["gate_up"].double(), p.act)
    check_close(shown["h"][live], h[live], h.abs()[live] + 1)

    want, magnitude = weighted_sum(shown["y"], weights, local)
    if p.router.zero_experts:
        identity = torch.where(inputs.topk_ids >= p.E, inputs.topk_weights, 0.0).double().sum(1, keepdim=True)
        want, magnitude = want + identity * x_TH.double(), magnitude + (identity * x_TH).abs()
    want, magnitude = want * p.scale_on_sum, magnitude * p.scale_on_sum
    if p.shared:
        assert inputs.shared_w1 is not None and inputs.shared_w2 is not None
        extra = activation(x_TH.double() @ inputs.shared_w1.double().T, p.act) @ inputs.shared_w2.double().T
        if inputs.shared_gate is not None:
            extra = extra * torch.sigmoid(x_TH.double() @ inputs.shared_gate.double())[:, None]
        want, magnitude = want + extra, magnitude + extra.abs() + 4
    check_close(shown["out"], want, magnitude)


@pytest.mark.parametrize("line", PROBLEMS + BIASED)
def test_triton_layer(line: str) -> None:
    inputs = make(problem(line))
    p, x = inputs.problem, inputs.hidden_states.clone()
    shown = layer.run(inputs)

    assert tuple(shown) == next(c.shows for c in candidates() if isinstance(c, Candidate) and c.name == "triton")
    assert (shown["out"] is inputs.hidden_states) == p.inplace
    if not p.inplace:
        assert torch.equal(inputs.hidden_states, x)
    check_stages(x, inputs, shown)
    if p.T:
        ids, weights = plain_route(inputs.logits, p.router, p.K, inputs.correction_bias, None, inputs.table_ids)  # type: ignore[arg-type]
        assert shown["topk_ids"].tolist() == ids
        torch.testing.assert_close(shown["topk_weights"].cpu(), torch.tensor(weights), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("line", PROBLEMS)
def test_torch_grouped(line: str) -> None:
    inputs = make(problem(line))
    reason = torch_grouped.unsupported(inputs.problem)
    if reason and DEVICE == "cuda":
        pytest.skip(reason)
    x = inputs.hidden_states.clone()

    assert reason is None
    check_stages(x, inputs, torch_grouped.run(inputs))


def test_no_logits_no_routing() -> None:
    inputs = make(problem(PROBLEMS[0]))
    assert "topk_ids" not in layer.run(Inputs(**{**vars(inputs), "logits": None}))


@pytest.mark.parametrize(
    ("line", "supporters"),
    [
        ("T=4,H=16,I=8,E=4,K=2", {"triton", "triton-fused", "triton-modular", "torch-grouped"}),
        ("T=4,H=16,I=8,E=4,K=2,inplace=1", {"triton", "triton-fused", "triton-modular", "torch-grouped"}),
        ("T=4,H=16,I=8,E=4,K=2,layout=batched,capacity=4", {"triton-batched"}),
        ("T=4,H=16,I=8,E=4,K=2,shared=8", {"triton", "triton-fused", "torch-grouped"}),
        ("T=4,H=16,I=8,E=4,K=2,scale_on_sum=2", {"triton", "triton-fused", "torch-grouped"}),
        ("T=4,H=16,I=8,E=4,K=2,expert_bias=1", {"triton", "triton-fused", "triton-modular"}),
        ("T=4,H=16,I=7,E=4,K=2", {"triton", "triton-fused", "triton-modular"}),
        ("T=4,H=16,I=8,E=4,K=2,dtype=fp32", {"triton", "triton-modular", "torch-grouped"}),
        ("T=4,H=16,I=8,E=4,K=2,latent=8", set()),
        ("T=4,H=16,I=8,E=4,K=2,ep=2,shared=8", set()),
        ("T=4,H=16,I=8,E=4,K=2,ep=2,router=softmax:zero_experts=2", set()),
    ],
)
def test_support_is_declared(line: str, supporters: set[str]) -> None:
    assert {c.name for c in candidates() if c.supports(problem(line)) is None} == supporters


def test_pairs_build() -> None:
    inputs = make(problem("T=4,H=16,I=8,E=4,K=2"))
    pairs = [c for c in candidates() if isinstance(c, Pair) and c.supports(replace(inputs.problem, layout=c.layout)) is None]
    for pair in pairs:
        assert pair.prepare_finalize(inputs).topk_indices_dtype() is None
        assert pair.experts(inputs).workspace_shapes(inputs.hidden_states, inputs.w1, 4, 16, 16, 2, 4)[2] == torch.bfloat16
