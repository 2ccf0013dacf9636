"""Which cases a tier holds: `quick` for every save, `full` for every merge, `soak` for the night."""

from __future__ import annotations

from moeproof.harness.cases.axes import covering
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.presets import PRESETS, preset, scaled
from moeproof.harness.cases.quant_sample import sample_quantised
from moeproof.harness.cases.sample import ACTIVATIONS, sample
from moeproof.reference.contract.errors import known
from moeproof.reference.contract.schemes import SCHEMES

TIERS = {
    "quick": "one plain layer through every recipe, boundary sizes, each dtype",
    "full": "quick, every model preset (scaled), every pair of values of two axes, and 200 cases of quantised schemes",
    "soak": "full, and 2,000 random cases, and 2,000 of quantised schemes",
    "sweep": "every 16-bit gate through every activation, every code and rounding boundary of every dynamic quantiser",
}

SWEPT = tuple(act for act in dict.fromkeys(ACTIVATIONS) if act != "silu:limit=1")
"""Every activation; a limit of 7 stands for all: beyond it nothing changes any more."""
_PLAIN = "T=33,H=104,I=72,E=8,K=2"
QUICK = (
    f"{_PLAIN},relation=permute,seed=1",
    f"{_PLAIN},dtype=fp16,values=hetero,seed=2",
    f"{_PLAIN},dtype=fp32,routing=zipf,seed=3",
    f"{_PLAIN},values=int,routing=tile,seed=4",
    f"{_PLAIN},values=sat,seed=5",
    f"{_PLAIN},values=sat,routing=minus1,storage=KN,seed=6",
    f"{_PLAIN},routing=dup,values=hetero,seed=7",
    f"{_PLAIN},routing=empty,seed=8",
    f"{_PLAIN},routing=hot,strided=1,seed=9",
    f"{_PLAIN},routing=none,seed=10",
    f"{_PLAIN},routing=router,router=softmax:renorm=sum,logits=ties,seed=11",
    f"{_PLAIN},router=sigmoid:groups=4/2:top2:renorm=sum,logits=ties,seed=16",
    "T=0,H=32,I=16,E=4,K=2,seed=12",
    "T=1,H=64,I=48,E=5,K=1,history=interleave,seed=13",
    "T=16,H=64,I=32,E=60,K=6,dtype=fp32,seed=14",
    "T=17,H=40,I=50,E=12,K=10,routing=minus1,seed=15",
)
"""Case lines of the quick tier."""


def preset_cases(tokens: int = 8, full_size: bool = False, dtype: str = "bf16") -> list[tuple[str, Case]]:
    """(model, case) of every preset: the scaled twin for a CPU, or the layer at full size."""
    from dataclasses import replace

    chosen = []
    for name in PRESETS:
        problem = preset(name)
        problem = replace(problem, T=tokens) if full_size else scaled(problem, T=tokens)
        chosen.append((name, Case(replace(problem, dtype=dtype))))
    return chosen


def cases_of(tier: str) -> list[Case]:
    """The cases of a tier, in a fixed order."""
    known("tier", tier, TIERS)
    if tier == "sweep":
        return [*sweep_cases(), *code_cases()]
    cases = [parse_case(line) for line in QUICK]
    if tier != "quick":
        cases += [case for _, case in preset_cases()]
        cases += [*covering(), *sample_quantised(200)]
    if tier == "soak":
        cases += [*sample(2000), *sample_quantised(2000, start=200)]
    return cases


def code_cases() -> list[Case]:
    """Every code and boundary of QUANT1, for each scheme that scales x by its own amax, from float32 and from bf16."""
    swept = [name for name, s in SCHEMES.items() if s.a1 is not None and not (s.a1.static or s.a1.two_level)]
    sizes = "T=24,H=128,I=128,E=3,K=2"
    return [parse_case(f"{sizes},dtype={dtype},scheme={name},values=codes") for name in swept for dtype in ("fp32", "bf16")]


def sweep_cases() -> list[Case]:
    """All bit patterns of bf16 and fp16 gates, each with two up values, through every activation of the sample."""
    lines = [f"T=512,H=264,I=256,E=1,K=1,dtype={dtype},act={act},values=sweep" for dtype in ("bf16", "fp16") for act in SWEPT]
    return [parse_case(line) for line in lines]
