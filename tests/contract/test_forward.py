"""S12, S13, S18, S22-S25 and the refusals of forward, for every prepare/finalize with every experts class of its layout."""

from typing import Any

import pytest
import torch
from contract_kit import (
    DEVICE,
    NAN,
    Crossed,
    case,
    every_pair,
    every_shipped_pair,
    expected_out,
    expected_slots,
    expected_sum,
    forward,
    same,
    snapshot,
    unchanged,
    with_ids,
)

from moeproof.reference.contract import Activation, ContractError, FusedMoEModularKernel
from moeproof.reference.eager import LoopExperts, NoEPPrepareAndFinalize

Tensor = torch.Tensor

CASES: list[tuple[str, dict[str, Any]]] = [
    ("uniform", {}),
    ("hot", {"strided": True, "dtype": "fp32"}),
    ("minus1", {"storage": "KN", "dtype": "fp16", "T": 9}),
    ("dup", {"act": Activation("gelu"), "E": 10, "ep": 4, "ep_rank": 1}),
    ("none", {}),
]


@every_pair
@pytest.mark.parametrize(("routing", "fields"), CASES)
def test_s24_s05_forward_is_right_bit_for_bit_and_keeps_the_dtype(pair: Crossed, routing: str, fields: dict[str, Any]) -> None:
    inputs = case(pair.layout, routing=routing, **fields)
    want = expected_out(inputs)

    out = forward(pair.kernel(inputs), inputs)

    assert out.dtype == inputs.problem.fmt.dtype
    same(out, want)


@every_pair
def test_s22_not_in_place_leaves_every_input_bitwise_unchanged(pair: Crossed) -> None:
    inputs = case(pair.layout, routing="minus1", values="normal")
    before = snapshot(inputs)

    out = forward(pair.kernel(inputs), inputs)

    unchanged(inputs, before)
    assert out.data_ptr() != inputs.hidden_states.data_ptr()


@every_pair
def test_s22_in_place_returns_the_input_itself_and_changes_nothing_else(pair: Crossed) -> None:
    inputs = case(pair.layout, routing="dup", inplace=True)
    before, want = snapshot(inputs), expected_out(inputs)

    out = forward(pair.kernel(inputs), inputs)

    assert out is inputs.hidden_states
    same(out, want)
    unchanged(inputs.map({"hidden_states": before["hidden_states"]}), before)


class Watch:
    """Forwards to the real object and lists the methods that were called."""

    def __init__(self, inner: object, calls: list[str]) -> None:
        self.inner, self.calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self.inner, name)


def watched(pair: Crossed, inputs: Any) -> tuple[FusedMoEModularKernel, list[str]]:
    calls: list[str] = []
    front, back = pair.front.prepare_finalize(inputs), pair.back.experts(inputs)
    return FusedMoEModularKernel(Watch(front, calls), Watch(back, calls)), calls  # type: ignore[arg-type]


@every_pair
def test_s23_s11_no_tokens_still_reaches_finalize(pair: Crossed) -> None:
    inputs = case(pair.layout, T=0)
    kernel, calls = watched(pair, inputs)

    out = forward(kernel, inputs)

    assert tuple(out.shape) == (0, 20)
    assert out.dtype == torch.bfloat16
    assert calls.index("prepare") < calls.index("finalize")
    if pair.layout == "standard":
        assert "apply" not in calls


def test_s23_f_nothing_arrived_skips_the_experts_and_still_finalizes() -> None:
    """A rank that has tokens but receives no row: the empty result has the input's dtype, and the output is zeros."""
    seen: list[Tensor] = []

    class Nothing(NoEPPrepareAndFinalize):
        def prepare(self, a1: Tensor, *args: Any, **kwargs: Any) -> Any:
            return a1.new_empty(0, a1.size(1), dtype=torch.uint8), None, None, None, None

        def finalize(self, output: Tensor, fused_expert_output: Tensor, *args: Any, **kwargs: Any) -> None:
            seen.append(fused_expert_output)
            super().finalize(output, fused_expert_output, *args, **kwargs)

    inputs = case()
    out = forward(FusedMoEModularKernel(Nothing(), LoopExperts()), inputs)

    assert seen[0].dtype == torch.bfloat16
    assert seen[0].numel() == 0
    assert (out == 0).all()


def test_s10_dispatched_ids_and_weights_replace_the_originals() -> None:
    inputs = with_ids(case(), [[0, 1, 2]] * 5)
    moved = with_ids(inputs, [[3, 4, 5]] * 5, [[1.0, 0.5, 4.0]] * 5)

    class Moved(NoEPPrepareAndFinalize):
        def prepare(self, a1: Tensor, *args: Any, **kwargs: Any) -> Any:
            return a1, None, None, moved.topk_ids, moved.topk_weights

    same(forward(FusedMoEModularKernel(Moved(), LoopExperts()), inputs), expected_out(moved))


class Unreachable(NoEPPrepareAndFinalize):
    """Everything must be refused before prepare, which may be a collective that other ranks would wait in."""

    ids_dtype: torch.dtype | None = None
    bound: int | None = None

    def topk_indices_dtype(self) -> torch.dtype | None:
        return self.ids_dtype

    def max_num_tokens_per_rank(self) -> int | None:
        return self.bound

    def prepare(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("prepare was called")


def unreachable(**attributes: Any) -> FusedMoEModularKernel:
    front = Unreachable()
    for name, value in attributes.items():
        setattr(front, name, value)
    return FusedMoEModularKernel(front, LoopExperts())


@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_s12_ids_of_another_dtype_than_named_are_refused_before_dispatch(dtype: torch.dtype) -> None:
    inputs = case()
    with pytest.raises(ContractError, match=rf"topk_ids is {dtype}, this prepare/finalize needs torch.int32"):
        forward(unreachable(ids_dtype=torch.int32), inputs, topk_ids=inputs.topk_ids.to(dtype))


@pytest.mark.parametrize("bound", [0, 4])
def test_s13_more_tokens_than_the_bound_are_refused_before_any_collective(bound: int) -> None:
    with pytest.raises(ContractError, match=f"5 tokens on this rank, at most {bound} are allowed"):
        forward(unreachable(bound=bound), case())


@every_shipped_pair
def test_s13_a_bound_of_an_implementation_holds(pair: Crossed) -> None:
    inputs = case(pair.layout)
    bound = pair.front.prepare_finalize(inputs).max_num_tokens_per_rank()
    if bound is None:
        return
    inputs = case(pair.layout, T=bound + 1)
    with pytest.raises(ContractError, match=f"{bound + 1} tokens"):
        forward(pair.kernel(inputs), inputs)


def z(*shape: int, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = DEVICE) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


I32, F32 = torch.int32, torch.float32
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "hidden 3-D": ({"hidden_states": z(1, 5, 20)}, "hidden_states has 3 dims, must have 2"),
    "w1 2-D": ({"w1": z(24, 20)}, "w1 and w2 have 2 and 3 dims"),
    "w1 columns": ({"w1": z(7, 24, 21)}, "w1 has 21 input columns, hidden_states 20"),
    "w1 rows": ({"w1": z(7, 23, 20)}, "w1 has 23 rows per expert and w2 12"),
    "w2 experts": ({"w2": z(6, 20, 12)}, "w1 holds 7 experts and w2 6"),
    "w2 rows": ({"w2": z(7, 21, 12)}, "w2 has 21 output columns, hidden_states 20"),
    "ids 1-D": ({"topk_ids": z(15, dtype=I32)}, r"topk_ids is \(15,\)"),
    "ids and weights": ({"topk_weights": z(5, 2, dtype=F32)}, r"topk_ids is \(5, 3\) and topk_weights \(5, 2\)"),
    "rows of ids": ({"topk_ids": z(4, 3, dtype=I32), "topk_weights": z(4, 3, dtype=F32)}, "topk_ids has 4 rows"),
    "float ids": ({"topk_ids": z(5, 3, dtype=F32)}, "topk_ids is torch.float32, must be an integer"),
    "bool ids": ({"topk_ids": z(5, 3, dtype=torch.bool)}, "topk_ids is torch.bool"),
    "integer weights": ({"topk_weights": z(5, 3, dtype=I32)}, "topk_weights is torch.int32, must be a floating"),
    "w1 and w2 dtype": ({"w2": z(7, 20, 12, dtype=F32)}, "w1 is torch.bfloat16 and w2 torch.float32"),
    "hidden dtype": ({"hidden_states": z(5, 20, dtype=F32)}, "hidden_states is torch.float32 and w1 torch.bfloat16"),
    "weight on input": ({"apply_router_weight_on_input": True}, "apply_router_weight_on_input with topk=3"),
    "map dtype": ({"expert_map": z(7, dtype=torch.int64)}, "expert_map is torch.int64"),
    "map 2-D": ({"expert_map": z(7, 1, dtype=I32)}, "expert_map is torch.int32 with 2 dims"),
    "map length": ({"expert_map": z(8, dtype=I32)}, "expert_map has 8 entries, global_num_experts is 7"),
    "no map": ({"global_num_experts": 14}, "global_num_experts=14 but w1 holds 7 experts and there is no expert_map"),
    "ids device": ({"topk_ids": z(5, 3, dtype=I32, device="meta")}, "topk_ids is on meta"),
    "w1 device": ({"w1": z(7, 24, 20, device="meta")}, "w1 is on meta"),
    "map device": ({"expert_map": z(7, dtype=I32, device="meta")}, "expert_map is on meta"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_decision_wrong_shapes_dtypes_devices_refused_before_any_launch(name: str) -> None:
    """(S18 and S02 are among them.) The message names the tensor and what it is."""
    changes, message = REFUSED[name]

    with pytest.raises(ContractError, match=message):
        forward(unreachable(), case(), **changes)


@every_pair
def test_decision_wrong_shapes_nothing_changes_when_forward_refuses(pair: Crossed) -> None:
    inputs = case(pair.layout, inplace=True)
    before = snapshot(inputs)
    with pytest.raises(ValueError, match="nonsense"):
        forward(pair.kernel(inputs), inputs, activation="nonsense")

    unchanged(inputs, before)


@every_shipped_pair
def test_s18_global_num_experts_minus_one_is_the_default(pair: Crossed) -> None:
    inputs = case(pair.layout)

    out = pair.kernel(inputs)(inputs.hidden_states, inputs.w1, inputs.w2, inputs.topk_weights, inputs.topk_ids)

    same(out, expected_out(inputs))


@every_shipped_pair
def test_s07_decision_weights_applied_exactly_once_on_input_or_on_output(pair: Crossed) -> None:
    """Negative weights tell input from output: silu(-g) is no multiple of silu(g)."""
    ids, weights = [[4], [2], [-1], [2], [0]], [[2.0], [1.0], [NAN], [-1.0], [-4.0]]
    outs = []
    for on_input in (False, True):
        inputs = with_ids(case(pair.layout, K=1, weight_on_input=on_input), ids, weights)
        outs.append(forward(pair.kernel(inputs), inputs))
        same(outs[-1], expected_out(inputs))

    assert not torch.equal(*outs)


@every_shipped_pair
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_s17_f16_partial_sums_of_all_ranks_make_the_whole(pair: Crossed, placement: str) -> None:
    """7 experts on 2 ranks; exact in float32, so the sum over ranks is the single rank's output bit for bit."""
    fields: dict[str, Any] = {"dtype": "fp32", "routing": "dup", "T": 4}
    total = torch.zeros(4, 20)
    for rank in range(2):
        inputs = case(pair.layout, ep=2, ep_rank=rank, placement=placement, **fields)
        total += forward(pair.kernel(inputs), inputs).cpu()

    same(total, expected_out(case(pair.layout, **fields)))


@every_shipped_pair
def test_s25_decision_determinism_same_bits_from_run_to_run(pair: Crossed) -> None:
    inputs = case(pair.layout, values="normal", routing="hot", T=9)
    assert pair.front.claims.deterministic in ("run", "batch")

    first, second = (forward(pair.kernel(inputs), inputs) for _ in range(2))

    assert torch.equal(first, second)


@every_shipped_pair
def test_s11_one_instance_serves_calls_with_other_routing(pair: Crossed) -> None:
    """Nothing of the first call, dense, may be left in the second, sparse."""
    first, second = case(pair.layout, seed=1), case(pair.layout, routing="minus1", seed=2)
    kernel = pair.kernel(first)

    same(forward(kernel, first), expected_out(first))
    same(forward(kernel, second), expected_out(second))


@every_shipped_pair
def test_s03_a_bad_token_spoils_its_own_row_only(pair: Crossed) -> None:
    inputs = case(pair.layout, routing="hot", values="normal")
    clean = forward(pair.kernel(inputs), inputs)
    x = inputs.hidden_states.clone()
    x[2] = NAN

    got = forward(pair.kernel(inputs), inputs.map({"hidden_states": x}))

    assert got[2].isnan().all()
    for t in (0, 1, 3, 4):
        same(got[t], clean[t])


@every_shipped_pair
def test_s05_weight_scale_is_not_normalised_away(pair: Crossed) -> None:
    inputs = case(pair.layout)
    doubled = inputs.map({"topk_weights": inputs.topk_weights * 4})

    same(forward(pair.kernel(inputs), doubled), (expected_sum(inputs, expected_slots(inputs)[1]) * 4).bfloat16())
