"""S03, S04, S16-S21 and biases: what apply returns, in every implementation."""

import math

import pytest
import torch
from contract_kit import (
    DEVICE,
    NAN,
    apply,
    batched,
    case,
    every_part,
    expected_slots,
    same,
    slot_rows,
    snapshot,
    unchanged,
    with_ids,
)

from moeproof.reference.contract import Activation, ContractError, Inputs, Pair


def dead_slots(inputs: Inputs) -> torch.Tensor:
    """bool (T, K)."""
    dead = torch.ones(inputs.topk_ids.shape, dtype=torch.bool)
    for t, k, _, _ in slot_rows(inputs)[0]:
        dead[t, k] = False
    return dead


@every_part
@pytest.mark.parametrize(
    ("routing", "fields"),
    [
        ("uniform", {}),
        ("empty", {"dtype": "fp16", "storage": "KN", "act": Activation("gelu")}),
        ("dup", {"ep": 3, "ep_rank": 1, "placement": "round_robin"}),
        ("minus1", {"ep": 3, "ep_rank": 2, "T": 9}),
        ("uniform", {"strided": True, "act": Activation("silu", interleaved=True)}),
        ("uniform", {"act": Activation("relu_no_mul"), "I": 14}),
    ],
)
def test_s16_unweighted_unreduced_outputs_and_zeros_for_dead_slots(part: Pair, routing: str, fields: dict[str, object]) -> None:
    inputs = case(part.layout, routing=routing, **fields)
    before = snapshot(inputs)

    got = apply(part, inputs)

    same(got.y, expected_slots(inputs)[1].to(got.y.dtype))
    unchanged(inputs, before)
    if part.layout == "standard":
        assert (got.y[dead_slots(inputs)] == 0).all()


@every_part
def test_s16_weights_are_not_applied_by_the_experts(part: Pair) -> None:
    inputs = case(part.layout)
    other = inputs.map({"topk_weights": inputs.topk_weights * 3})

    assert torch.equal(apply(part, inputs).y, apply(part, other).y)


@every_part
def test_s03_padding_rows_never_influence_a_valid_row(part: Pair) -> None:
    if part.layout == "standard":
        # The rows nobody routes are the padding of this layout.
        inputs = case(routing="minus1", T=9)
        x = inputs.hidden_states.clone()
        x[dead_slots(inputs).all(1)] = NAN
        got = apply(part, inputs.map({"hidden_states": x})).y
        assert got.isfinite().all()
        same(got, apply(part, inputs).y)
        return
    inputs = case("batched", routing="hot", capacity=7)
    results = [apply(part, inputs, padding=padding).y for padding in (NAN, 1e4, 0.0)]

    assert results[0].isfinite().all()
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_part
def test_s16_zero_rows_for_every_expert(part: Pair) -> None:
    inputs = case(part.layout, routing="none")

    assert (apply(part, inputs).y == 0).all()


@every_part
def test_s04_decision_minus_one_ids_out_of_range_are_refused_or_dead(part: Pair) -> None:
    """The reference names the first bad slot. Others may treat it as not routed, but never read what lies there."""
    if part.layout == "batched":
        return  # ids are not looked at behind dispatch
    inputs = case()
    bad = with_ids(inputs, [[0, 1, 2], [3, 7, 4], [99, 1, 0], [0, 1, 2], [2**30, 5, 6]])
    dead = with_ids(inputs, [[0, 1, 2], [3, -1, 4], [-1, 1, 0], [0, 1, 2], [-1, 5, 6]])

    if part.name.startswith("eager"):
        with pytest.raises(ContractError, match=r"topk_ids\[1, 1\] = 7 is out of range"):
            apply(part, bad)
        return
    try:
        got = apply(part, bad).y
    except ContractError:
        return
    same(got, expected_slots(dead)[1].to(got.dtype))


@every_part
def test_s04_decision_duplicate_ids_are_computed_slot_by_slot(part: Pair) -> None:
    inputs = with_ids(case(part.layout), [[3, 3, 3], [0, 5, 0], [1, 1, -1], [6, 6, 6], [2, 4, 4]])

    same(apply(part, inputs).y, expected_slots(inputs)[1].to(torch.bfloat16))


@every_part
def test_s17_f06_minus_one_never_reads_the_last_entry_of_the_map(part: Pair) -> None:
    """NaN weights in the expert that map[-1] and w1[-1] would give."""
    inputs = with_ids(case(part.layout, ep=2, ep_rank=1), [[-1, 4, 0]] * 5)
    w1, w2 = inputs.w1.clone(), inputs.w2.clone()
    w1[-1], w2[-1] = NAN, NAN
    poisoned = inputs.map({"w1": w1, "w2": w2})

    same(apply(part, poisoned).y, expected_slots(inputs)[1].to(torch.bfloat16))


@every_part
def test_s18_global_num_experts_minus_one_means_the_experts_of_w1(part: Pair) -> None:
    inputs = case(part.layout)

    same(apply(part, inputs, global_num_experts=-1).y, expected_slots(inputs)[1].to(torch.bfloat16))


@every_part
@pytest.mark.parametrize("name", ["w1_scale", "w2_scale", "w1_zp", "w2_zp", "a1q_scale", "a2_scale"])
def test_s19_s20_s21_scales_and_zero_points_are_refused_by_name_while_unquantised(part: Pair, name: str) -> None:
    with pytest.raises(ContractError, match=name):
        apply(part, case(part.layout), **{name: torch.ones(7, 1, 1, device=DEVICE)})


@every_part
def test_s09_batched_experts_need_the_counts(part: Pair) -> None:
    if part.layout == "batched":
        with pytest.raises(ContractError, match="expert_num_tokens is None"):
            apply(part, case("batched"), expert_num_tokens=None)


@every_part
def test_s16_biases_are_per_expert_and_unweighted(part: Pair) -> None:
    """Exact: integers through relu."""
    inputs = case(
        part.layout, values="int", act=Activation("relu_no_mul"), expert_bias=True, dtype="fp32", routing="dup", ep=2, ep_rank=1
    )
    assert inputs.b1 is not None
    assert bool(inputs.b1.any())

    same(apply(part, inputs).y, expected_slots(inputs)[1].float())


@every_part
def test_decision_wrong_shapes_experts_made_for_another_activation_refuse(part: Pair) -> None:
    for other in ("gelu", "silu_no_mul", "silu:limit=3", "nonsense"):
        with pytest.raises(ContractError, match=other.split(":")[0]):
            apply(part, case(part.layout), activation=other)


@every_part
def test_s15_decision_gate_up_packing_a_gated_name_needs_both_halves(part: Pair) -> None:
    """Width I where 2I is needed: the gated name must not be read as its ungated twin (F14)."""
    inputs = case(part.layout)
    with pytest.raises(ContractError, match="w1"):
        apply(part, inputs, w1=inputs.w1[:, :12], global_num_experts=7)


# The activations: w1 and w2 are identities, so y is the activation of the input itself.


def act_scalar(act: Activation, g: float, u: float) -> float:
    """One element in double precision, from the definitions in docs/contract.md."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    def tanh_gelu(x: float) -> float:
        return x * sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))

    limit, alpha, beta = act.limit or math.inf, act.alpha or 1.0, act.beta or 0.0
    name = act.name.removesuffix("_no_mul")
    if name == "silu":
        g, u = min(g, limit), max(-limit, min(u, limit))
        return g * sigmoid(g) * u
    if name == "gelu":
        return 0.5 * g * math.erfc(-g / math.sqrt(2)) * u
    if name == "gelu_tanh":
        return tanh_gelu(g) * u
    if name.startswith("swigluoai"):
        g, u = min(g, limit), max(-limit, min(u, limit))
        return g * sigmoid(alpha * g) * (u + beta)
    if name == "swiglustep":
        return min(g * sigmoid(g), limit) * max(-limit, min(u, limit))
    if name == "situ":
        up = act.linear_beta * math.tanh(u / act.linear_beta) if act.linear_beta else u
        return beta * math.tanh(g / beta) * sigmoid(g) * up
    return max(g, 0.0) ** (2 if name == "relu2" else 1)


VOCABULARY = [
    "silu",
    "silu:limit=7",
    "silu:interleaved",
    "gelu",
    "gelu_tanh",
    "swigluoai",
    "swigluoai:packed",
    "swigluoai_uninterleave:alpha=1.3:beta=0.5:limit=3",
    "swiglustep",
    "situ:beta=4",
    "situ:beta=4:linear_beta=25",
    "silu_no_mul",
    "gelu_no_mul",
    "gelu_tanh_no_mul",
    "relu2_no_mul",
    "relu_no_mul",
]
GATES = (-40.0, -12.0, -7.5, -4.0, -2.75, -1.0, -0.125, 0.0, 0.25, 1.0, 2.5, 6.5, 7.5, 36.0)
UPS = (1.5, -9.0, 0.75, 36.0, 1.0)
"""Beyond five times every limit on both sides, and where the two gelus differ most."""


@every_part
@pytest.mark.parametrize("text", VOCABULARY)
def test_decision_gate_up_packing_every_activation_of_the_vocabulary(part: Pair, text: str) -> None:
    act = Activation.parse(text)
    if part.backend != "torch" and part.layout == "batched" and VOCABULARY.index(text) % 3:
        return  # the interpreter is slow, and the formulas are those of the standard layout
    width = len(GATES)
    N = act.width_in(width)
    inputs = case(part.layout, T=5, H=N, I=width, E=2, K=1, dtype="fp32", act=act, values="normal")
    x = torch.zeros(5, N)
    for t, u in enumerate(UPS):
        for i, g in enumerate(GATES):
            if not act.gated:
                x[t, i] = g
            elif act.interleaved:
                x[t, 2 * i], x[t, 2 * i + 1] = g, u
            else:
                x[t, i], x[t, width + i] = g, u
    w2 = torch.eye(N, width)[None].expand(2, N, width)
    changes = {"hidden_states": x, "w1": torch.eye(N)[None].expand(2, N, N).contiguous(), "w2": w2.contiguous()}
    inputs = inputs.map({name: t.to(DEVICE) for name, t in changes.items()})
    before = snapshot(inputs)

    got = apply(part, inputs).y[:, 0, :width].double()

    for t, u in enumerate(UPS):
        for i, g in enumerate(GATES):
            u_used = u if act.gated else 1.0
            want = act_scalar(act, g, u_used)
            # A chain of a dozen float32 roundings; exp's argument and 1 + erf lose in proportion to g and to g * u.
            slack = 2.0**-24 * ((24 + 2 * abs(g)) * abs(want) + 8 * abs(g * u_used)) + 2.0**-119
            assert abs(float(got[t, i]) - want) <= slack, f"{text} of gate {g}, up {u}: got {float(got[t, i])}, want {want}"
    unchanged(inputs, before)


@every_part
def test_s14_activation_output_stands_in_workspace2_where_the_pair_says_so(part: Pair) -> None:
    if not part.slots_in_workspace2:
        return
    inputs = case(part.layout, routing="minus1")
    h = apply(part, inputs).workspace2[: 5 * 3 * 12].view(5, 3, 12).cpu()
    live = ~dead_slots(inputs)

    same(h[live], expected_slots(inputs)[0][live].to(h.dtype))


@every_part
def test_s03_batched_rows_in_any_position_are_computed_where_they_stand(part: Pair) -> None:
    """The valid rows of each region turned upside down: the result must turn with them."""
    if part.layout == "standard":
        return
    inputs = case("batched", capacity=5)
    rows, counts = batched(inputs, inputs.hidden_states[:, None].expand(5, 3, 20))
    turned = rows.clone()
    for e, count in enumerate(counts.tolist()):
        turned[e, :count] = rows[e, :count].flip(0)
    plain, flipped = apply(part, inputs), apply(part, inputs, hidden_states=turned)

    for e, count in enumerate(counts.tolist()):
        same(flipped.raw[e, :count], plain.raw[e, :count].flip(0))
