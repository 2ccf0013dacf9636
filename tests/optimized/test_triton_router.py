"""ROUTE: every option against Python floats; ties, NaN and underflow give the contract's defined rows."""

from __future__ import annotations

import pytest
import torch
from plain_layer import DEVICE, normal, strided
from plain_layer import route as plain_route

from moeproof.optimized.router import route, unsupported
from moeproof.reference.contract import ContractError, Problem, Router

Tensor = torch.Tensor
OPTIONS = [
    *(
        "softmax",
        "softmax:renorm=sum",
        "softmax_topk",
        "sigmoid",
        "sigmoid:renorm=sum",
        "sqrtsoftplus:renorm=eps/1e-20:scale=1.5",
    ),
    *(
        "sigmoid:bias:renorm=eps/1e-06",
        "softmax:bias:renorm=floor/0.5",
        "sqrtsoftplus:bias:scale=2.5",
        "sigmoid:expert_scale:scale=2",
    ),
    *(
        "softmax:renorm=lp/1",
        "softmax:renorm=lp/2",
        "sigmoid:bias:renorm=lp/3",
        "softmax:multiplier=0.3:softcap=1.5",
        "softmax_topk:multiplier=3",
    ),
    *(
        "softmax:zero_experts=3:bias",
        "sigmoid:fused_shared=2:renorm=sum:scale=2.5:expert_scale",
        "softmax:table",
        "sqrtsoftplus:table:renorm=eps/1e-20",
    ),
    *("softmax_topk:table", "sqrtsoftplus:bias:table"),
]
GROUPED = [
    *(
        "softmax:groups=4/2",
        "sigmoid:bias:groups=4/2:top2:renorm=sum",
        "sigmoid:groups=4/3:top2",
        "softmax:groups=4/1:rejected=zero",
    ),
    *(
        "sigmoid:bias:groups=4/2:top2:rejected=zero",
        "softmax:groups=4/4",
        "sigmoid:bias:groups=4/0",
        "softmax:groups=2/0:renorm=sum",
    ),
]


def extras(router: Router, T: int, K: int, width: int) -> dict[str, Tensor | None]:
    """The tensors a router needs. The bias lies below zero, so that a rejected group filled with 0 would win."""
    E = width - router.zero_experts
    table = torch.randint(0, width, (T, K), generator=torch.Generator().manual_seed(9)).to(torch.int32).to(DEVICE)
    return {
        "correction_bias": normal(7, width, scale=0.5) - 1.0 if router.bias else None,
        "expert_scale": normal(8, E).abs() + 0.5 if router.expert_scale else None,
        "table_ids_TK": table if router.table else None,
    }


def check(logits: Tensor, text: str, K: int) -> None:
    router = Router.parse(text)
    more = extras(router, logits.shape[0], K, logits.shape[1])
    want_ids, want = plain_route(logits, router, K, *more.values())
    ids, weights = route(logits, router, K, **more)

    assert ids.tolist() == want_ids
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.cpu().double(), torch.tensor(want, dtype=torch.float64), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("text", OPTIONS)
@pytest.mark.parametrize(("T", "E", "K"), [(9, 60, 6), (5, 8, 2)])
def test_options(text: str, T: int, E: int, K: int) -> None:
    check(normal(1, T, E + Router.parse(text).zero_experts, scale=2), text, K)


@pytest.mark.parametrize("text", GROUPED)
@pytest.mark.parametrize(("E", "K"), [(60, 4), (16, 4), (160, 8)])
def test_groups(text: str, E: int, K: int) -> None:
    check(normal(2, 9, E, scale=2), text, K)


@pytest.mark.parametrize(("E", "K"), [(1, 1), (5, 5), (7, 3), (16, 16), (129, 12), (512, 10)])
def test_sizes(E: int, K: int) -> None:
    check(normal(3, 17, E), "softmax:renorm=sum", K)


def test_sparsemixer() -> None:
    logits = torch.cat([normal(4, 8, 16), normal(5, 8, 16, scale=0.01) + 3, normal(6, 4, 16) - 9])
    check(logits, "sparsemixer", 2)
    check(logits, "sparsemixer:jitter_eps=0.2:scale=2", 2)


@pytest.mark.parametrize(
    "text", ["softmax", "softmax_topk", "sigmoid:bias", "sqrtsoftplus:renorm=sum", "softmax:groups=4/2", "sigmoid:groups=4/0"]
)
def test_the_lowest_id_wins_a_tie(text: str) -> None:
    """Few distinct values; equal biases keep them tied."""
    router = Router.parse(text)
    logits = torch.randint(-1, 2, (20, 12), generator=torch.Generator().manual_seed(3)).float().to(DEVICE)
    bias = torch.full((12,), -0.5, device=DEVICE) if router.bias else None
    want, _ = plain_route(logits, router, 4, bias, None, None)

    assert route(logits, router, 4, correction_bias=bias)[0].tolist() == want


def test_all_equal_logits_give_the_first_experts() -> None:
    ids, _ = route(torch.zeros(3, 60, device=DEVICE), Router("softmax", renorm="sum"), 12)
    assert ids.tolist() == [list(range(12))] * 3


@pytest.mark.parametrize(
    "text",
    [
        "softmax",
        "softmax_topk",
        "sigmoid:renorm=sum",
        "sqrtsoftplus:bias:renorm=sum",
        "sigmoid:bias:groups=4/2:top2:renorm=sum",
        "sparsemixer",
    ],
)
def test_a_row_without_a_finite_logit_gives_the_lowest_ids_and_zeros(text: str) -> None:
    router, logits = Router.parse(text), normal(5, 6, 12)
    more = extras(router, 6, 2, 12)
    clean = route(logits, router, 2, **more)
    logits[1], logits[4] = float("nan"), float("-inf")
    ids, weights = route(logits, router, 2, **more)

    assert ids[[1, 4]].tolist() == [[0, 1]] * 2
    assert weights[[1, 4]].tolist() == [[0.0, 0.0]] * 2
    others = [0, 2, 3, 5]
    assert torch.equal(ids[others], clean[0][others])
    assert torch.equal(weights[others], clean[1][others])


@pytest.mark.parametrize("text", ["softmax:renorm=sum", "softmax_topk", "sigmoid:bias:renorm=sum", "sqrtsoftplus:groups=4/1"])
def test_nan_is_chosen_last(text: str) -> None:
    """With fewer finite logits than slots, ids stay distinct and the bad ones have weight 0."""
    logits = torch.full((4, 12), float("nan"), device=DEVICE)
    logits[:, 7] = 1.0
    logits[2, 3] = float("inf")
    router = Router.parse(text)
    ids, weights = route(logits, router, 3, **extras(router, 4, 3, 12))

    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert all(7 in row for row in ids[[0, 1, 3]].tolist())
    assert bool(weights.isfinite().all())
    assert weights[0, ids[0].tolist().index(7)] > 0
    assert weights[0].count_nonzero() == 1


@pytest.mark.parametrize(
    "text", ["sigmoid:renorm=sum", "sigmoid:bias:renorm=sum", "sigmoid:renorm=eps/1e-20", "softmax:renorm=sum"]
)
def test_underflow_stays_finite(text: str) -> None:
    router = Router.parse(text)
    _, weights = route(normal(6, 5, 8) - 110, router, 3, **extras(router, 5, 3, 8))

    assert bool(weights.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_and_strided_logits(dtype: torch.dtype) -> None:
    check(strided(normal(7, 9, 60, dtype=dtype)), "softmax:bias:renorm=sum", 6)


def test_no_tokens() -> None:
    ids, weights = route(torch.empty(0, 8, device=DEVICE), Router(fused_shared=1), 2)
    assert ids.shape == weights.shape == (0, 3)


def test_refusals() -> None:
    logits = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ContractError, match="correction_bias"):
        route(logits, Router(bias=True), 2)
    with pytest.raises(ContractError, match="correction_bias must be"):
        route(logits, Router(bias=True), 2, correction_bias=torch.zeros(7, device=DEVICE))
    with pytest.raises(ContractError, match="K=9"):
        route(logits, Router(), 9)
    with pytest.raises(ContractError, match="3 groups"):
        route(logits, Router(groups=3, keep=1), 2)
    with pytest.raises(ContractError, match="quota"):
        route(logits, Router(groups=4), 2)
    with pytest.raises(ContractError, match="in kept groups"):
        route(logits, Router(groups=4, keep=1), 3)
    assert "identity" in str(unsupported(Problem(T=1, H=1, I=1, E=4, K=1, router=Router(expert_scale=True, zero_experts=1))))
