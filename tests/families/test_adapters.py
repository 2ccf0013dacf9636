"""transformers' three expert implementations as candidates: right within the bound they claim, and -1 caught."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moeproof.harness import workers
from moeproof.harness.cases.generator import Stream
from moeproof.harness.reports import report
from moeproof.reference.contract import FORMATS, Activation, Candidate, Claims, Inputs, Problem, expert_map
from moeproof.reference.oracle import activate, chain

pytest.importorskip("transformers", reason="the candidates are transformers' own: pip install 'moeproof[models]'")

from .adapters import CANDIDATES, IMPLEMENTATIONS, RAW_GROUPED_MM, run_raw, supports
from .agreement import Agreement, measure

BASE = Problem(T=40, H=64, I=48, E=16, K=4)
GPT_OSS: dict[str, Any] = {"act": Activation("swigluoai"), "expert_bias": True, "storage": "KN"}
PROBLEMS: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "qwen3": {"K": 8, "H": 128, "I": 96},
    "ragged": {"H": 72, "I": 88},
    "one token": {"T": 1},
    "no token": {"T": 0},
    "gelu": {"act": Activation("gelu")},
    "gelu_tanh": {"act": Activation("gelu_tanh")},
    "clamped": {"act": Activation("silu", limit=1)},
    "ungated": {"act": Activation("relu2_no_mul")},
    "gpt-oss": GPT_OSS,
    "transposed": {"storage": "KN"},
    "one of four ranks": {"ep": 4, "ep_rank": 1},
}


def inputs_of(p: Problem, dropped: bool = False) -> Inputs:
    """Experts with pre-activations near 1, K distinct experts a token; `dropped` slots are -1 with weight NaN."""
    stream, dtype = Stream(3, "adapters"), p.fmt.dtype
    e = len(p.local)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (scale * stream.normal(*shape)).to(dtype)

    w1, w2 = normal(e, p.N, p.H, scale=p.H**-0.5), normal(e, p.H, p.I, scale=p.I**-0.5)
    if p.storage == "KN":
        w1, w2 = (w.transpose(1, 2).contiguous().transpose(1, 2) for w in (w1, w2))
    biases = {"b1": normal(e, p.N), "b2": normal(e, p.H)} if p.expert_bias else {}
    ids, weights = stream.shuffled(p.T, p.E)[:, : p.K].int(), stream.uniform(p.T, p.K).float() + 0.1
    if dropped:
        ids[::3, 0] = -1
        ids[-2:] = -1
        weights[ids < 0] = torch.nan
    local = expert_map(p.E, p.ep, p.ep_rank)
    return Inputs(p, normal(p.T, p.H), ids, weights, w1, w2, expert_map=local, **biases)


def judged(candidate: Candidate, inputs: Inputs) -> Agreement:
    """The candidate's output against the chained bound of its own claims."""
    got = candidate.run(inputs)
    assert isinstance(got, torch.Tensor)
    assert got.dtype == inputs.hidden_states.dtype
    out = chain(inputs, candidate.claims)["out"]
    assert out.bound is not None
    return measure(got, out.value, out.bound, torch.ones(inputs.problem.T, dtype=torch.bool))


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
@pytest.mark.parametrize("dropped", [False, True], ids=["routed", "dropped"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_candidate_is_within_its_bound(name: str, dtype: str, dropped: bool, candidate: Candidate) -> None:
    problem = dataclasses.replace(BASE, dtype=dtype, **PROBLEMS[name])
    assert candidate.supports(problem) is None

    agreement = judged(candidate, inputs_of(problem, dropped))

    assert agreement.holds, agreement


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda c: c.name)
def test_candidate_with_wrong_weights_is_caught(candidate: Candidate) -> None:
    """The bound the candidate claims still has teeth: experts in the wrong order fail it in bf16."""
    inputs = inputs_of(dataclasses.replace(BASE, dtype="bf16"))
    wrong = dataclasses.replace(candidate, run=lambda i: candidate.run(i.map({"w2": i.w2.roll(1, 0)})))

    assert not judged(wrong, inputs).holds


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_transformers_grouped_mm_minus_one_is_caught(dtype: str) -> None:
    """Given id -1 (vLLM's mark of a dropped slot) grouped_mm answers without an error, and wrongly: rows shift by one group."""
    inputs = inputs_of(dataclasses.replace(BASE, dtype=dtype), dropped=True)
    inputs = inputs.map({"topk_weights": inputs.topk_weights.nan_to_num(0.0)})

    agreement = judged(RAW_GROUPED_MM, inputs)

    assert not agreement.holds
    assert agreement.bad > 100
    assert judged(CANDIDATES[2], inputs).holds, "translated to transformers' own convention it must be right"


@pytest.mark.parametrize(("routing", "code"), [("uniform", 0), ("minus1", 1)])
def test_the_worked_example_of_the_docs(routing: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/plugging-in.md: the same kernel passes where every slot is routed, and fails with a replay line where not."""
    path = Path(__file__).parents[2] / "docs/examples/transformers_experts.py"
    work = workers.plan([], [f"T=33,H=64,I=48,E=8,K=2,routing={routing},seed=1"], "", 0, 0, "bf16", False)
    verdicts = list(workers.run([f"{path}:grouped_mm"], work, "interpret", 1))

    assert report.verify(verdicts, work, json=False) == code
    assert (f"--candidate {path}:grouped_mm" in capsys.readouterr().out) == bool(code)


def test_without_dropped_slots_the_raw_adapter_is_right() -> None:
    assert judged(RAW_GROUPED_MM, inputs_of(dataclasses.replace(BASE, dtype="fp32"))).holds


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_claim_covers_an_activation_rounded_at_each_operation(dtype: str) -> None:
    """gpt-oss' own gate in low precision: it rounds 1.702 g before the sigmoid, 2.7 % of the result at g = -8 in bf16."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    fmt, act = FORMATS[dtype], Activation("swigluoai")
    gate, up = torch.meshgrid(torch.arange(-12, 12, 1 / 32), torch.linspace(-9, 9, 64), indexing="ij")
    gate_up = torch.stack([gate, up], dim=-1).reshape(1, -1).to(fmt.dtype)
    experts: Any = SimpleNamespace(limit=act.limit, alpha=act.alpha)
    got = GptOssExperts._apply_gate(experts, gate_up)

    value = activate(gate_up, act, fmt, Claims(activation="dtype"))

    assert value.bound is not None
    assert measure(got, value.value, value.bound, torch.tensor([True])).holds
    strict = activate(gate_up, act, fmt, Claims())
    assert strict.bound is not None
    assert measure(got, strict.value, strict.bound, torch.tensor([True])).holds == (dtype == "fp32")


def test_eager_refuses_minus_one() -> None:
    with pytest.raises(RuntimeError, match="non-negative"):
        run_raw(inputs_of(dataclasses.replace(BASE, dtype="fp32"), dropped=True), "eager")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shared": 64}, "shared expert"),
        ({"latent": 32}, "latent"),
        ({"weight_on_input": True, "K": 1}, "weights on the input"),
        ({"expert_bias": True}, "biases"),
        ({"act": Activation("swiglustep")}, "swiglustep"),
        ({"layout": "batched"}, "batched"),
    ],
)
def test_what_the_classes_do_not_compute_is_refused(changes: dict[str, object], reason: str) -> None:
    answer = supports(dataclasses.replace(BASE, **changes))  # type: ignore[arg-type]

    assert answer is not None
    assert reason in answer


def test_grouped_mm_refuses_rows_it_cannot_load() -> None:
    problem = dataclasses.replace(BASE, H=90)

    assert [c.supports(problem) is None for c in CANDIDATES] == [True, True, False]
    assert len(CANDIDATES) == len(IMPLEMENTATIONS)
