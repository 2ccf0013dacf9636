"""Random cases over all axes at once: features x shapes x routing x values. Aligned, uniform, plain cases are a minority."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

from moeproof.harness.cases.case import LOGITS, ROUTINGS, VALUES, Case
from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

T = TypeVar("T")

TOKENS = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48)
HIDDEN = (16, 32, 40, 64, 72, 96, 104, 128)
INTERMEDIATE = (16, 24, 32, 48, 50, 64, 88, 112)
EXPERTS = (1, 2, 3, 5, 8, 12, 17, 60)
SLOTS = (1, 2, 3, 4, 6, 8, 10)
SAMPLED_VALUES = tuple(v for v in VALUES if v not in ("sweep", "groups", "experts", "edges", "ties", "codes", "pin", "least"))
"""The sweep is a tier of its own: it wants one expert and 2^17 gates. The others are about scales (quant_sample)."""
ACTIVATIONS = (
    "silu",
    "silu",
    "silu:limit=1",
    "gelu",
    "gelu_tanh",
    "swigluoai",
    "swigluoai_uninterleave:limit=7",
    "swiglustep:limit=1",
    "situ:beta=4:linear_beta=25",
    "silu_no_mul",
    "gelu_no_mul",
    "gelu_tanh_no_mul",
    "relu2_no_mul",
    "relu_no_mul",
)
"""Recipes that need no quantised scheme; quant_sample draws the others."""
ROUTERS = (
    "softmax",
    "softmax:renorm=sum",
    "softmax_topk",
    "sigmoid:renorm=sum",
    "sigmoid:bias:renorm=eps/1e-20:scale=2.5",
    "softmax:bias:renorm=floor/1e-12",
    "sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
    "softmax:multiplier=0.5:softcap=30",
    "softmax:renorm=sum:expert_scale",
    "sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5",
    "softmax:groups=4/1:rejected=zero:scale=16",
    "sparsemixer",
    "sqrtsoftplus:table:renorm=eps/1e-20",
    "sigmoid:renorm=sum:fused_shared=1",
    "softmax:bias:zero_experts=4:scale=6",
)


def _pick(s: Stream, options: Sequence[T]) -> T:
    return options[int(s.integers(0, len(options), 1))]


def _chance(s: Stream, one_in: int) -> bool:
    return int(s.integers(0, one_in, 1)) == 0


def draw(seed: int, layout: str | None = None, dtype: str | None = None) -> Case:
    """The random case of this seed. Axes that exclude each other are drawn again, so every seed gives a case."""
    s = Stream(seed, "sample")
    while True:
        try:
            return _draw(s, seed, layout, dtype)
        except ContractError:
            continue  # an impossible combination, e.g. K > E


def _draw(s: Stream, seed: int, layout: str | None, dtype: str | None) -> Case:
    E, K = _pick(s, EXPERTS), _pick(s, SLOTS)
    ep = _pick(s, (1, 1, 1, 2, 3))
    # Drawn in a fixed order whatever is overridden, so that a seed's other axes do not move.
    own_layout, own_dtype = _pick(s, ("standard", "standard", "batched")), _pick(s, ("bf16", "bf16", "fp16", "fp32"))
    problem = Problem(
        T=_pick(s, TOKENS),
        H=_pick(s, HIDDEN),
        I=_pick(s, INTERMEDIATE),
        E=E,
        K=K,
        dtype=dtype or own_dtype,
        act=Activation.parse(_pick(s, ACTIVATIONS)),
        router=Router.parse(_pick(s, ROUTERS)),
        expert_bias=_chance(s, 4),
        weight_on_input=K == 1 and _chance(s, 2),
        scale_on_sum=2.5 if _chance(s, 8) else 1.0,
        shared=24 if _chance(s, 6) else 0,
        layout=layout or own_layout,
        storage="KN" if _chance(s, 4) else "NK",
        ep=ep,
        ep_rank=int(s.integers(0, ep, 1)),
        placement=_pick(s, ("linear", "round_robin")),
        inplace=_chance(s, 10),
    )
    return Case(
        problem,
        values=_pick(s, SAMPLED_VALUES),
        routing=_pick(s, tuple(ROUTINGS)),
        logits=_pick(s, tuple(LOGITS)),
        strided=_chance(s, 5),
        seed=seed,
    )


def sample(count: int, start: int = 0) -> Iterator[Case]:
    """`count` random cases, of the seeds from `start` on."""
    for seed in range(start, start + count):
        yield draw(seed)
