"""The definition of `out` for whole-layer candidates: shared, identity and latent terms, and the factor on the sum.

out = scale_on_sum * (sum over live slots of w * y + sum over identity slots of w * x) + shared(x) * sigmoid(x . gate)
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from contract_kit import DEVICE, act64, case, every_layer, expected_slots, expected_sum, rounded, same, snapshot, unchanged

from moeproof.reference.contract import Candidate, Inputs, Router

ZERO = Router("softmax", zero_experts=3)
PARTS: dict[str, dict[str, Any]] = {
    "routed": {},
    "scale on the sum": {"scale_on_sum": 2.5},
    "shared": {"shared": 8, "scale_on_sum": 2.5},
    "shared and gate": {"shared": 8, "shared_gate": True},
    "identity": {"router": ZERO, "scale_on_sum": 2.5},
    "fused shared": {"router": Router("sigmoid", fused_shared=2)},
    "latent": {"latent": 14, "shared": 8},
    "latent and norm": {"latent": 14, "latent_norm": True, "scale_on_sum": 2.5, "shared": 8},
    "bias": {"expert_bias": True},
    "weight on input": {"weight_on_input": True, "K": 1},
    "in place": {"inplace": True, "shared": 8},
    "rank": {"ep": 3, "ep_rank": 1},
}


def shared64(inputs: Inputs) -> torch.Tensor:
    p, x = inputs.problem, inputs.hidden_states.double().cpu()
    assert inputs.shared_w1 is not None
    assert inputs.shared_w2 is not None
    out = torch.zeros(p.T, p.H, dtype=torch.float64)
    for t in range(p.T):
        a = (inputs.shared_w1.double().cpu() @ x[t]).tolist()
        h = torch.tensor([act64(a[i], a[p.shared + i]) for i in range(p.shared)], dtype=torch.float64)
        out[t] = inputs.shared_w2.double().cpu() @ h
        if inputs.shared_gate is not None:
            out[t] *= torch.sigmoid(x[t] @ inputs.shared_gate.double().cpu())
    return out


def out64(inputs: Inputs) -> torch.Tensor:
    p = inputs.problem
    x = inputs.hidden_states.double().cpu()
    inner = inputs
    if p.latent:
        assert inputs.latent_down is not None
        narrow = rounded(x @ inputs.latent_down.double().cpu().T, p.fmt.dtype)
        inner = inputs.map({"hidden_states": narrow.to(DEVICE)})
    total = expected_sum(inputs, expected_slots(inner)[1])
    for t in range(p.T):
        for k in range(p.slots):
            if p.E <= int(inputs.topk_ids[t, k]) < p.E + p.router.zero_experts:
                total[t] += float(inputs.topk_weights[t, k]) * x[t]
    total = total * p.scale_on_sum
    if p.latent:
        assert inputs.latent_up is not None
        total = rounded(total, p.fmt.dtype)
        if p.latent_norm:
            assert inputs.latent_norm is not None
            mean = (total * total).mean(1, keepdim=True)
            total = total / torch.sqrt(mean + 1e-6) * inputs.latent_norm.double().cpu()
        total = total @ inputs.latent_up.double().cpu().T
    return total + shared64(inputs) if p.shared else total


@every_layer
@pytest.mark.parametrize("name", PARTS)
def test_decision_accumulation_definition_of_out(layer: Candidate, name: str) -> None:
    """float32, where the rounding of the stages is 2^-13 of the outputs: a missing or doubled term is of their size."""
    inputs = case(
        values="normal", dtype="fp32", H=24, I=16, **({"latent": 14} | PARTS[name] if "latent" in name else PARTS[name])
    )
    if layer.supports(inputs.problem) is not None:
        assert layer.name != "eager-stages", layer.supports(inputs.problem)
        return
    want, before = out64(inputs), snapshot(inputs)

    shown = layer.run(inputs)

    assert isinstance(shown, Mapping)
    assert shown["out"].dtype == torch.float32
    assert (shown["out"].double().cpu() - want).abs().max() <= 2.0**-13 * want.abs().max()
    if inputs.problem.inplace:
        assert shown["out"].data_ptr() == inputs.hidden_states.data_ptr() or layer.name != "eager-stages"
    else:
        unchanged(inputs, before)


@every_layer
def test_s16_stages_are_exact_where_arithmetic_is(layer: Candidate) -> None:
    inputs = case(routing="minus1", T=9, H=24, I=16)
    h, y = expected_slots(inputs)

    shown = layer.run(inputs)

    assert isinstance(shown, Mapping)
    live = (inputs.topk_ids >= 0).cpu()
    for name, want in (("h", h), ("y", y)):
        if name in layer.shows:  # fused layers keep h to themselves
            same(shown[name].cpu()[live], want[live].bfloat16())
    same(shown["out"], expected_sum(inputs, y).bfloat16())


@every_layer
def test_decision_empty_no_tokens_and_no_routed_slot(layer: Candidate) -> None:
    for inputs in (case(T=0, H=24, I=16), case(routing="none", H=24, I=16)):
        shown = layer.run(inputs)

        assert isinstance(shown, Mapping)
        assert shown["out"].shape == inputs.hidden_states.shape
        assert (shown["out"] == 0).all()
