"""S01-S03: sizes come from the tensors that can be trusted, whatever the packing."""

import contract_kit  # noqa: F401  (settles how kernels run)
import pytest
import torch

from moeproof.reference.contract import ContractError, modular, moe_problem_size


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


IDS = empty(5, 3, dtype=torch.int32)


def test_s01_returns_experts_rows_n_hidden_topk() -> None:
    assert moe_problem_size(empty(5, 20), empty(7, 24, 20), empty(7, 20, 12), IDS) == (7, 5, 24, 20, 3)


def test_s01_the_seed_name_is_the_same_function() -> None:
    assert modular._moe_problem_size is moe_problem_size


def test_s01_packed_weights_are_sized_without_their_trailing_dims() -> None:
    packed1, packed2 = empty(7, 24, 10, dtype=torch.uint8), empty(7, 20, 6, dtype=torch.uint8)

    assert moe_problem_size(empty(5, 20), packed1, packed2, IDS) == (7, 5, 24, 20, 3)


def test_s02_two_dims_take_rows_from_a1_and_need_as_many_ids() -> None:
    with pytest.raises(ContractError, match=r"topk_ids has 5 rows and a1 6"):
        moe_problem_size(empty(6, 20), empty(7, 24, 20), empty(7, 20, 12), IDS)


def test_s03_three_dims_are_batched_and_m_is_rows_per_expert() -> None:
    assert moe_problem_size(empty(7, 9, 20), empty(7, 24, 20), empty(7, 20, 12), IDS) == (7, 9, 24, 20, 3)


def test_s03_batched_for_another_number_of_experts_is_refused() -> None:
    with pytest.raises(ContractError, match=r"a1 is batched for 6 experts but w1 holds 7"):
        moe_problem_size(empty(6, 9, 20), empty(7, 24, 20), empty(7, 20, 12), IDS)


@pytest.mark.parametrize(
    ("a1", "w1", "w2", "ids", "named"),
    [
        (empty(20), empty(7, 24, 20), empty(7, 20, 12), IDS, "a1 has 1 dims"),
        (empty(5, 20), empty(24, 20), empty(7, 20, 12), IDS, "w1 has 2 dims"),
        (empty(5, 20), empty(7, 24, 20), empty(20, 12), IDS, "w2 has 2 dims"),
        (empty(5, 20), empty(7, 24, 20), empty(6, 20, 12), IDS, "w1 holds 7 experts and w2 6"),
        (empty(5, 20), empty(7, 24, 20), empty(7, 21, 12), IDS, "w2 has 21 output columns and a1 20"),
        (empty(5, 20), empty(7, 24, 20), empty(7, 20, 12), empty(5, dtype=torch.int32), "topk_ids has 1 dims"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_s01_refusals_name_the_tensor(
    a1: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, named: str
) -> None:
    with pytest.raises(ContractError, match=named):
        moe_problem_size(a1, w1, w2, ids)
