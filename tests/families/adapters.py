"""transformers' three expert implementations as moeproof candidates: eager loop, batched_mm, grouped_mm.

`CANDIDATES` is the list to judge. transformers is imported when a candidate runs; without it `supports` says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from moeproof.reference.contract import Candidate, Claims, Inputs, Problem

Tensor = torch.Tensor
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")

_ACT2FN = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def supports(p: Problem) -> str | None:
    """None, or why transformers' expert classes do not compute this problem."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed"
    reasons = {
        "quantised weights": p.scheme != "none",
        "the batched layout": p.layout != "standard",
        "weights on the input": p.weight_on_input,
        "a shared expert (it is outside the experts class)": p.shared > 0,
        "a latent projection (it is outside the experts class)": p.latent > 0,
        "identity experts": p.router.zero_experts > 0,
        "in-place output": p.inplace,
        "a factor on the sum": p.scale_on_sum != 1.0,
    }
    for what, present in reasons.items():
        if present:
            return f"transformers' experts take no {what}"
    if _class(p) is None:
        bias = " with biases" if p.expert_bias else ""
        return f"no experts class of transformers computes act={p.act}{bias}"
    return None


def _class(p: Problem) -> tuple[str, str] | None:
    """(module, class) of the experts that compute the problem's activation with its packing and biases."""
    act = p.act
    if act.name == "swigluoai" and act.interleaved and act.beta == 1.0 and p.expert_bias:
        return "gpt_oss", "GptOssExperts"
    if p.expert_bias or act.interleaved:
        return None
    if act.name == "silu" and act.limit:
        return "deepseek_v4", "DeepseekV4Experts"
    if act.name in _ACT2FN:
        return "mixtral", "MixtralExperts"
    return ("nemotron_h", "NemotronHExperts") if act.name == "relu2_no_mul" else None


def experts_of(inputs: Inputs, implementation: str) -> Any:
    """The experts module on the inputs' own weights (no copy where the layouts agree), set to `implementation`."""
    p = inputs.problem
    found = _class(p)
    assert found is not None
    module, name = found
    count = inputs.w1.shape[0]
    config = SimpleNamespace(
        num_local_experts=count,
        n_routed_experts=count,
        hidden_size=p.hidden,
        intermediate_size=p.I,
        moe_intermediate_size=p.I,
        moe_latent_size=None,
        hidden_act=_ACT2FN.get(p.act.name, "silu"),
        mlp_hidden_act="relu2",
        swiglu_limit=p.act.limit,
        swiglu_alpha=p.act.alpha,
        _experts_implementation=implementation,
    )
    with torch.device("meta"):
        experts = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), name)(config)
    w1, w2 = inputs.w1, inputs.w2
    if experts.is_transposed:
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    # grouped_mm's kernel wants dense operands; strided arguments are copied here, outside what is judged.
    tensors = {"gate_up_proj" if p.act.gated else "up_proj": w1, "down_proj": w2}
    if p.expert_bias:
        assert inputs.b1 is not None and inputs.b2 is not None
        tensors |= {"gate_up_proj_bias": inputs.b1, "down_proj_bias": inputs.b2}
    for key, value in tensors.items():
        setattr(experts, key, torch.nn.Parameter(value.contiguous(), requires_grad=False))
    return experts.eval()


def local_routing(inputs: Inputs, sentinel: int) -> tuple[Tensor, Tensor]:
    """(ids int64, weights) in transformers' expert-parallel convention: `sentinel` with weight 0 where not live here."""
    ids = inputs.topk_ids.long()
    if inputs.expert_map is not None:
        ids = torch.where(ids >= 0, inputs.expert_map.long()[ids.clamp(min=0)], -1)
    live = ids >= 0
    return torch.where(live, ids, sentinel), torch.where(live, inputs.topk_weights, 0.0)


def run(inputs: Inputs, implementation: str) -> Tensor:
    """The experts' output for the given routing, (T, H) in the input's dtype."""
    experts = experts_of(inputs, implementation)
    p, count = inputs.problem, inputs.w1.shape[0]
    # The eager loops of gpt_oss and nemotron_h know no class E; a slot with weight 0 may name any expert there.
    no_sentinel = implementation == "eager" and (p.expert_bias or not p.act.gated)
    ids, weights = local_routing(inputs, 0 if no_sentinel else count)
    experts._is_expert_parallel = True
    x = inputs.hidden_states.contiguous()
    with torch.no_grad():
        result: Tensor = experts(x, ids, weights)
    return result


def run_raw(inputs: Inputs, implementation: str) -> Tensor:
    """The same without any care for slots that are not routed: ids go in as they are."""
    with torch.no_grad():
        result: Tensor = experts_of(inputs, implementation)(inputs.hidden_states, inputs.topk_ids.long(), inputs.topk_weights)
    return result


def supports_grouped_mm(p: Problem) -> str | None:
    """torch's grouped_mm takes operands whose rows are a multiple of 16 bytes."""
    size = p.fmt.dtype.itemsize
    for name, width in (("hidden width", p.hidden), ("I", p.I)):
        if width * size % 16:
            return f"torch's grouped_mm needs rows of a multiple of 16 bytes; {name} {width} in {p.dtype} has {width * size}"
    return supports(p)


def _candidate(implementation: str) -> Candidate:
    # Eager adds slots into an output of the model's dtype; the other two sum in the weights' float32 and cast once. All
    # store the activation of the gate, and then its product, in the model's dtype.
    claims = Claims(activation="dtype", combine="dtype" if implementation == "eager" else "fp32")
    return Candidate(
        name=f"transformers-{implementation}",
        run=lambda inputs: run(inputs, implementation),
        supports=supports_grouped_mm if implementation == "grouped_mm" else supports,
        claims=claims,
    )


CANDIDATES: list[Candidate] = [_candidate(name) for name in IMPLEMENTATIONS]

RAW_GROUPED_MM = replace(CANDIDATES[2], name="transformers-grouped_mm-raw", run=lambda inputs: run_raw(inputs, "grouped_mm"))
"""Fed with id -1 as it is, it answers garbage without a word (docs/models.md): for tests that the harness catches it."""
