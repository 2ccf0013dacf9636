"""Cases that few compiled kernels serve: a fixed set of layers, in which tokens, values, routing, logits and history vary.

Triton compiles a kernel for every new combination of constexpr arguments, dtypes and divisibility of sizes and strides, in
about half a second: with `sample`'s sizes nearly every case pays for all of its kernels. Here a layer's first cases pay, and
all others judge. Sizes and features at random are what `sample` and `axes` draw, for the interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

from moeproof.harness.cases.case import LOGITS, ROUTINGS, Case, parse_case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.cases.quant_sample import VALUES as SCALED_VALUES
from moeproof.harness.cases.sample import SAMPLED_VALUES, _pick
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.problem import LAYOUTS
from moeproof.reference.contract.schemes import SCHEMES

TOKENS = (1, 7, 33, 64)
"""A single token, a part of one tile, rows that end inside a later one, whole tiles."""
RELATIONS = ("none", "none", "none", "permute", "relabel", "flip", "double")
"""Relations that keep the number of tokens, for which kernels are chosen."""
PLAIN = (
    "H=128,I=64,E=8,K=2,router=softmax:renorm=sum",
    "H=104,I=72,E=5,K=3,dtype=fp16,act=swigluoai,expert_bias=1,router=softmax_topk",
    "H=64,I=48,E=12,K=1,dtype=fp32,act=gelu,weight_on_input=1,router=sigmoid:renorm=sum",
    "H=128,I=112,E=60,K=6,act=silu:limit=1,storage=KN,router=sigmoid:bias:renorm=eps/1e-20:scale=2.5",
    "H=72,I=50,E=17,K=4,dtype=fp16,act=gelu_tanh,shared=24,router=sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
    "H=96,I=64,E=8,K=2,dtype=fp32,act=relu2_no_mul,ep=2,ep_rank=1,router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20",
    "H=256,I=128,E=16,K=8,act=gelu_no_mul,strided=1,router=softmax:bias:zero_experts=4:scale=6",
    "H=64,I=64,E=3,K=2,dtype=fp16,scale_on_sum=2.5,inplace=1,router=sparsemixer",
)
"""Unquantised layers, each run in both layouts: every dtype, and every feature that changes a kernel, somewhere."""
ALIGNED = (
    "H=256,I=128,E=7,K=2,scheme=fp8_token",
    "H=256,I=128,E=7,K=2,scheme=fp8_token,act=swigluoai,expert_bias=1",
    "H=256,I=128,E=7,K=2,scheme=fp8_block",
    "H=256,I=128,E=7,K=2,scheme=mxfp4_w4a16",
    "H=256,I=128,E=7,K=2,scheme=mxfp4_w4a16,dtype=fp16,act=swigluoai,expert_bias=1",
)
"""Quantised layers of the sizes, dtype and storage that library products and fused kernels ask for, in the standard layout."""
ACTIVATIONS = ("silu", "swigluoai", "silu", "gelu")
DTYPES = ("bf16", "fp16", "bf16", "fp32")


RUN = 8
"""Cases of one layer in a row: what one process judges with the kernels it has just loaded."""


class Layer(NamedTuple):
    """A case without its tokens and recipes."""

    case: Case
    values: tuple[str, ...]
    """Recipes to draw from; impossible ones are drawn again."""


@cache
def layers() -> tuple[Layer, ...]:
    """Every unquantised layer and every quantised scheme, in both layouts."""
    found = [Layer(parse_case(f"T=1,{line},layout={layout}"), SAMPLED_VALUES) for line in PLAIN for layout in LAYOUTS]
    for number, scheme in enumerate(QUANTISED):
        for layout in LAYOUTS:
            found.append(Layer(_quantised(scheme, number, layout), (*SCALED_VALUES, "asym", "wide")))
    return tuple(found)


@cache
def aligned_layers() -> tuple[Layer, ...]:
    return tuple(Layer(parse_case(f"T=1,{line}"), (*SCALED_VALUES, "asym", "wide")) for line in ALIGNED)


def _quantised(scheme: str, number: int, layout: str) -> Case:
    row = SCHEMES[scheme]
    unit = max([8, *(q.group[1] for q in (row.a1, row.a2, row.w) if q is not None and not q.ragged)])
    sizes = (-(-size // unit) * unit for size in ((200, 64), (128, 136))[number % 2])
    act, dtype = ACTIVATIONS[number % 4], DTYPES[number // 2 % 4]
    storage = "KN" if number % 3 == 2 else "NK"
    H, I = sizes  # noqa: E741  (the project's letter)
    return parse_case(f"T=1,H={H},I={I},E=7,K=2,dtype={dtype},act={act},storage={storage},scheme={scheme},layout={layout}")


def draw_compiled(layer: Layer, seed: int) -> Case:
    """The case of this seed in this layer. Axes that exclude each other are drawn again, so every seed gives a case."""
    s = Stream(seed, "compiled sample")
    while True:
        try:
            return replace(
                layer.case.with_problem(T=_pick(s, TOKENS)),
                values=_pick(s, layer.values),
                routing=_pick(s, tuple(ROUTINGS)),
                logits=_pick(s, tuple(LOGITS)),
                relation=_pick(s, RELATIONS),
                seed=seed,
            )
        except ContractError:
            continue


def compiled_case(number: int) -> Case:
    """Case `number` of an endless series, in which each layer has a turn of RUN cases."""
    return _turn(layers(), number)


def aligned_case(number: int) -> Case:
    """The same of ALIGNED."""
    return _turn(aligned_layers(), number)


def _turn(every: tuple[Layer, ...], number: int) -> Case:
    return draw_compiled(every[number // RUN % len(every)], number)
