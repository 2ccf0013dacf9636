"""S06-S10, S13: what prepare returns, in every implementation."""

from typing import Any

import pytest
import torch
from contract_kit import (
    DEVICE,
    case,
    every_part,
    found,
    local_of,
    payload,
    prepare,
    same,
    slot_rows,
    snapshot,
    unchanged,
    with_ids,
)

from moeproof.reference.contract import ContractError, Pair, local_experts

ROUTED = [
    ("uniform", 1, 0, "linear"),
    ("dup", 1, 0, "linear"),
    ("hot", 3, 0, "linear"),
    ("minus1", 3, 2, "linear"),
    ("dup", 3, 1, "round_robin"),
    ("none", 3, 1, "linear"),
]
every_routing = pytest.mark.parametrize(("routing", "ep", "rank", "placement"), ROUTED)


def ranked(part: Pair, routing: str, ep: int, rank: int, placement: str, **fields: Any) -> Any:
    return payload(case(part.layout, routing=routing, ep=ep, ep_rank=rank, placement=placement, **fields))


@every_part
@pytest.mark.parametrize("routing", ["minus1", "dup"])
def test_s06_prepare_returns_five_things_and_modifies_no_input(part: Pair, routing: str) -> None:
    inputs = case(part.layout, routing=routing)
    before = snapshot(inputs)

    a1q, scale, counts, ids, weights = prepare(part.prepare_finalize(inputs), inputs)

    unchanged(inputs, before)
    assert a1q.dtype == inputs.hidden_states.dtype
    assert a1q.size(-1) == inputs.problem.H
    assert scale is None
    assert (ids is None) == (weights is None)
    if part.layout == "batched":
        assert a1q.shape[:2] == (7, inputs.problem.rows_per_expert)
        assert counts is not None


@every_part
def test_s06_f01_weight_on_input_does_not_touch_the_callers_a1(part: Pair) -> None:
    inputs = with_ids(case(part.layout, K=1, weight_on_input=True), [[4], [2], [-1], [2], [0]], [[2.0]] * 5)
    before = snapshot(inputs)

    prepare(part.prepare_finalize(inputs), inputs)

    unchanged(inputs, before)


@every_part
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_s07_weight_on_input_is_the_rounded_product(part: Pair, dtype: str) -> None:
    inputs = case(part.layout, values="normal", K=1, weight_on_input=True, dtype=dtype)

    a1q, _, counts, _, _ = prepare(part.prepare_finalize(inputs), inputs)

    want = (inputs.hidden_states.float() * inputs.topk_weights.float()).to(a1q.dtype)
    if part.layout == "standard":
        same(a1q, want)
    else:
        for e in range(7):
            tokens = [t for t in range(5) if int(inputs.topk_ids[t, 0]) == e]
            got = sorted(a1q[e, : int(counts[e])].tolist())
            assert got == sorted(want[tokens].tolist())


@every_part
def test_s07_decision_weights_on_input_with_two_slots_is_refused(part: Pair) -> None:
    inputs = case(part.layout)

    with pytest.raises(ContractError, match="apply_router_weight_on_input with topk=3"):
        prepare(part.prepare_finalize(inputs), inputs, apply_router_weight_on_input=True)


@every_part
@pytest.mark.parametrize("name", ["a1_scale", "a2_scale"])
def test_s08_s21_scales_are_refused_by_name_while_unquantised(part: Pair, name: str) -> None:
    inputs = case(part.layout)

    with pytest.raises(ContractError, match=name):
        prepare(part.prepare_finalize(inputs), inputs, **{name: torch.ones(1, device=DEVICE)})


@every_part
@every_routing
def test_s09_f02_f04_counts_are_int32_local_and_of_slots(part: Pair, routing: str, ep: int, rank: int, placement: str) -> None:
    inputs = ranked(part, routing, ep, rank, placement)

    counts = prepare(part.prepare_finalize(inputs), inputs)[2]

    if counts is None:
        assert part.layout == "standard"
        return
    assert counts.dtype == torch.int32
    assert counts.tolist() == slot_rows(inputs)[1]
    assert len(counts) == len(local_experts(7, ep, rank, placement))


@every_part
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_s09_counts_of_all_ranks_sum_to_the_live_slots(part: Pair, placement: str) -> None:
    total, live = 0, 0
    for rank in range(3):
        inputs = ranked(part, "minus1", 3, rank, placement, T=9)
        counts = prepare(part.prepare_finalize(inputs), inputs)[2]
        total += 0 if counts is None else int(counts.sum())
        live = int((inputs.topk_ids >= 0).sum()) if counts is not None else 0

    assert total == live


@every_part
@every_routing
def test_s10_each_live_slot_is_dispatched_once_and_nothing_else(
    part: Pair, routing: str, ep: int, rank: int, placement: str
) -> None:
    inputs = ranked(part, routing, ep, rank, placement)

    a1q, _, counts, ids, weights = prepare(part.prepare_finalize(inputs), inputs)

    if part.layout == "batched":
        assert found(a1q, counts) == sorted((t, e) for t, _, e, _ in slot_rows(inputs)[0])
        return
    # Standard: row i of a1q goes with row i of the ids, dispatched or original.
    ids = inputs.topk_ids if ids is None else ids
    weights = inputs.topk_weights if weights is None else weights
    got = sorted(
        (int(a1q[i, 0]) - 1, e, float(w))
        for i in range(len(ids))
        for e, w in zip(ids[i].tolist(), weights[i], strict=True)
        if e >= 0
    )
    want = sorted(
        (t, e, float(w))
        for t in range(len(inputs.topk_ids))
        for e, w in zip(inputs.topk_ids[t].tolist(), inputs.topk_weights[t], strict=True)
        if e >= 0
    )
    assert got == want


@every_part
def test_s10_whole_rows_travel(part: Pair) -> None:
    inputs = case(part.layout, values="normal", routing="dup")

    a1q, _, counts, _, _ = prepare(part.prepare_finalize(inputs), inputs)

    if part.layout == "standard":
        same(a1q, inputs.hidden_states)
        return
    for e, count in enumerate(counts.tolist()):
        want = sorted(inputs.hidden_states[t].tolist() for t, _, at, _ in slot_rows(inputs)[0] if at == e)
        assert sorted(a1q[e, :count].tolist()) == want


@every_part
def test_s17_f06_minus_one_does_not_wrap_to_the_last_entry_of_the_map(part: Pair) -> None:
    """Expert 6, the map's last entry, lives on this rank; no token asks for it."""
    inputs = with_ids(case(part.layout, ep=2, ep_rank=1), [[-1, 4, -1]] * 5)
    assert local_of(inputs, 6) >= 0

    a1q, _, counts, _, _ = prepare(part.prepare_finalize(inputs), payload(inputs))

    if counts is not None:
        assert counts.tolist() == [5 if g == 4 else 0 for g in inputs.problem.local]
        assert [e for _, e in found(a1q, counts)] == [local_of(inputs, 4)] * 5


@every_part
def test_s13_f03_overflow_of_a_region_is_a_contract_error_with_count_and_capacity(part: Pair) -> None:
    if part.layout == "standard":
        assert part.prepare_finalize(case()).max_num_tokens_per_rank() is None
        return
    inputs = with_ids(case("batched", capacity=5), [[2, 2, 0], [2, 1, 0], [2, 4, 0], [2, 5, 1], [2, 6, 1]])
    before = snapshot(inputs)

    with pytest.raises(ContractError, match=r"expert 2.* 6 rows.*\b5\b"):
        prepare(part.prepare_finalize(inputs), inputs)

    unchanged(inputs, before)


@every_part
def test_s13_a_region_filled_to_the_last_row_is_no_overflow(part: Pair) -> None:
    capacity = {"capacity": 5} if part.layout == "batched" else {}
    inputs = payload(with_ids(case(part.layout, **capacity), [[6, 0, 5], [6, 0, 5], [6, 1, 5], [6, 0, 5], [6, 1, 5]]))

    a1q, _, counts, _, _ = prepare(part.prepare_finalize(inputs), inputs)

    if counts is not None:
        assert counts.tolist() == [3, 2, 0, 0, 0, 5, 5]
        assert found(a1q, counts) == sorted((t, e) for t, _, e, _ in slot_rows(inputs)[0])


@every_part
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_s12_ids_of_any_integer_dtype_where_none_is_named(part: Pair, dtype: torch.dtype) -> None:
    inputs = payload(case(part.layout, routing="minus1"))
    pf = part.prepare_finalize(inputs)
    if pf.topk_indices_dtype() not in (None, dtype):
        return

    a1q, _, counts, _, _ = prepare(pf, inputs, topk_ids=inputs.topk_ids.to(dtype))

    if counts is not None:
        assert found(a1q, counts) == sorted((t, e) for t, _, e, _ in slot_rows(inputs)[0])


@every_part
def test_decision_empty_no_tokens_and_no_routed_slot(part: Pair) -> None:
    for inputs in (case(part.layout, T=0), case(part.layout, routing="none")):
        a1q, _, counts, _, _ = prepare(part.prepare_finalize(inputs), inputs)

        assert a1q.size(-1) == 20
        assert counts is None or counts.tolist() == [0] * 7


@every_part
@pytest.mark.parametrize(("rank", "held"), [(0, 3), (1, 3), (2, 2), (3, 2)])
def test_s17_f07_f16_first_ranks_hold_the_remainder(part: Pair, rank: int, held: int) -> None:
    """10 experts on 4 ranks: 3, 3, 2, 2. Nothing may assume first expert = e * rank."""
    inputs = payload(case(part.layout, E=10, ep=4, ep_rank=rank, routing="dup"))
    assert inputs.w1.size(0) == held

    counts = prepare(part.prepare_finalize(inputs), inputs)[2]

    assert counts is None or counts.tolist() == slot_rows(inputs)[1]
