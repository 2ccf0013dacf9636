"""S05, S11 and the decisions on accumulation, weights and padding: what finalize writes, in every implementation."""

import pytest
import torch
from contract_kit import DEVICE, NAN, case, every_part, expected_sum, finalize, prepare, same, with_ids, y_of

from moeproof.reference.contract import Pair

ROUTED = [
    ("uniform", 1, 0, "linear"),
    ("dup", 1, 0, "linear"),
    ("minus1", 3, 2, "linear"),
    ("hot", 3, 1, "round_robin"),
    ("none", 3, 0, "linear"),
]


@every_part
@pytest.mark.parametrize(("routing", "ep", "rank", "placement"), ROUTED)
def test_s11_weighted_sum_over_slots_in_place(part: Pair, routing: str, ep: int, rank: int, placement: str) -> None:
    inputs = case(part.layout, routing=routing, ep=ep, ep_rank=rank, placement=placement)
    y = y_of(inputs, 20)
    # A remote slot's row is zero by S16.
    y = torch.where(torch.isnan(y) & (inputs.topk_ids >= 0).cpu()[:, :, None], 0.0, y)

    output, _ = finalize(part, inputs, y)

    same(output, expected_sum(inputs, y).to(output.dtype))


@every_part
def test_s11_writes_every_row_even_where_all_ids_are_minus_one(part: Pair) -> None:
    inputs = with_ids(case(part.layout), [[-1, -1, -1], [3, -1, 0], [-1, -1, -1], [0, 1, 2], [-1, -1, -1]])

    output, _ = finalize(part, inputs, y_of(inputs, 20))

    assert (output[[0, 2, 4]] == 0).all()
    assert output[[1, 3]].isfinite().all()


@every_part
def test_s11_plain_sum_when_the_weight_was_on_the_input(part: Pair) -> None:
    ids = [[4], [2], [-1], [2], [0]]
    inputs = with_ids(case(part.layout, K=1, weight_on_input=True), ids, [[3.0], [NAN], [NAN], [5.0], [0.0]])
    y = y_of(inputs, 20)

    output, _ = finalize(part, inputs, y)

    same(output, torch.where(y[:, 0].isnan(), 0.0, y[:, 0]).to(output.dtype))


@every_part
@pytest.mark.parametrize("weight", [NAN, float("inf"), 0.0])
def test_s05_f05_a_slot_with_id_minus_one_adds_exactly_zero(part: Pair, weight: float) -> None:
    """Neither its weight nor what stands in its row of y gets through."""
    inputs = with_ids(case(part.layout), [[2, -1, 5]] * 5, [[2.0, weight, 3.0]] * 5)
    for garbage in (NAN, float("inf")):
        y = y_of(inputs, 20)
        y[:, 1] = garbage

        output, _ = finalize(part, inputs, y)

        same(output, (2 * y[:, 0] + 3 * y[:, 2]).to(output.dtype))


@every_part
def test_s05_weights_of_any_sign_and_scale_are_taken_as_they_are(part: Pair) -> None:
    inputs = with_ids(case(part.layout), [[0, 1, 2]] * 5, [[-2.0, 0.0, 2.0**-20]] * 5)
    y = y_of(inputs, 20)

    output, _ = finalize(part, inputs, y)

    same(output, (-2 * y[:, 0] + 2.0**-20 * y[:, 2]).to(output.dtype))


@every_part
def test_s04_decision_duplicate_ids_each_slot_counts(part: Pair) -> None:
    inputs = with_ids(case(part.layout), [[3, 3, 3], [0, 5, 0], [1, 1, -1], [6, 6, 6], [2, 4, 4]])
    y = y_of(inputs, 20)

    output, _ = finalize(part, inputs, y)

    same(output, expected_sum(inputs, y).to(output.dtype))
    same(output[0], (7 * y[0, 0]).to(output.dtype))


@every_part
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_decision_accumulation_f10_float32_sum_and_one_rounding(part: Pair, dtype: str) -> None:
    """4096 + 1 - 4096 is 1; a running sum in 16 bits loses the 1."""
    inputs = with_ids(case(part.layout, dtype=dtype), [[0, 1, 2]] * 5, [[1.0, 1.0, -1.0]] * 5)
    y = torch.empty(5, 3, 20, dtype=torch.float64)
    y[:, 0], y[:, 1], y[:, 2] = 4096.0, 1.0, 4096.0

    output, _ = finalize(part, inputs, y)

    assert (output == 1).all()


@every_part
def test_decision_accumulation_weights_are_not_rounded_to_the_dtype(part: Pair) -> None:
    """(1 + 2^-12) - 1 is 2^-12; a weight rounded to bf16 loses it."""
    inputs = with_ids(case(part.layout), [[0, 1, -1]] * 5, [[1.0 + 2.0**-12, -1.0, NAN]] * 5)

    output, _ = finalize(part, inputs, torch.ones(5, 3, 20))

    assert (output == 2.0**-12).all()


@every_part
@pytest.mark.parametrize(("K", "H"), [(1, 33), (5, 1), (9, 33), (12, 17)])
def test_s11_all_slots_and_all_columns(part: Pair, K: int, H: int) -> None:
    inputs = case(part.layout, E=13, K=K, H=H)
    y = y_of(inputs, H)

    output, _ = finalize(part, inputs, y)

    same(output, expected_sum(inputs, y).to(output.dtype))


@every_part
def test_s11_f11_the_experts_output_is_not_overwritten(part: Pair) -> None:
    inputs = case(part.layout, routing="minus1")
    y = y_of(inputs, 20)

    _, first = finalize(part, inputs, y)

    kept = first.clone()
    finalize(part, inputs, y)
    assert torch.equal(first.isnan(), kept.isnan())
    y_again, passed = finalize(part, inputs, y, topk_weights=inputs.topk_weights * 2)
    assert torch.equal(passed.nan_to_num(7.0), kept.nan_to_num(7.0))
    assert y_again.isfinite().all()


@every_part
def test_s11_a_strided_output_leaves_its_neighbours_alone(part: Pair) -> None:
    inputs = case(part.layout)
    y = y_of(inputs, 20)
    wide = torch.full((5, 29), 77.0, dtype=torch.bfloat16, device=DEVICE)

    output, _ = finalize(part, inputs, y, output=wide[:, 4:24])

    same(output, expected_sum(inputs, y).to(output.dtype))
    assert (wide[:, :4] == 77).all()
    assert (wide[:, 24:] == 77).all()


@every_part
def test_s03_decision_padding_rows_of_the_batched_layout_never_matter(part: Pair) -> None:
    """`finalize` of the kit puts NaN into every row that belongs to no slot; here into all but one."""
    capacity = {"capacity": 11} if part.layout == "batched" else {}
    inputs = with_ids(case(part.layout, **capacity), [[-1, -1, -1]] * 4 + [[-1, 6, -1]])
    y = y_of(inputs, 20)

    output, passed = finalize(part, inputs, y)

    same(output[4], (2 * y[4, 1]).to(output.dtype))
    assert (output[:4] == 0).all()
    assert passed.isnan().sum() > passed.numel() / 2


@every_part
def test_decision_empty_finalize_of_nothing(part: Pair) -> None:
    inputs = case(part.layout, T=0)
    pf = part.prepare_finalize(inputs)
    rows = prepare(pf, inputs)[0]
    y = rows.new_zeros(0, 3, 20) if part.layout == "standard" else torch.full_like(rows, NAN)
    output = rows.new_empty(0, 20)

    assert pf.finalize(output, y, inputs.topk_weights, inputs.topk_ids, False) is None
