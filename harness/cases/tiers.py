"""Which cases a tier holds: `quick` for every save, `default` where nothing is said, `full` for every merge, `soak` for the
night."""

from __future__ import annotations

from moeproof.harness.cases.axes import covering
from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.presets import PRESETS, preset, scaled
from moeproof.harness.cases.quant_sample import KINDS, QUANTISED, sample_quantised, scheme_cases
from moeproof.harness.cases.sample import ACTIVATIONS, sample
from moeproof.reference.contract.errors import known
from moeproof.reference.contract.schemes import SCHEMES

TIERS = {
    "quick": "one plain layer through every recipe, boundary sizes, each dtype",
    "default": "quick, one case for each feature that quick leaves out, and three of each kind of quantised scheme",
    "full": "default, three cases of every quantised scheme, every model preset (scaled), every pair of values of two axes "
    "on one rank, and 200 cases of quantised schemes",
    "soak": "full, and 2,000 random cases, and 2,000 of quantised schemes",
    "far": "offsets beyond 2^31 elements in few rows: 60 GB of a GPU, or of a CPU's address space for plain torch",
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
    "T=0,H=32,I=24,E=4,K=2,seed=12",
    "T=1,H=64,I=48,E=5,K=1,history=interleave,seed=13",
    "T=16,H=64,I=40,E=60,K=6,dtype=fp32,seed=14",
    "T=17,H=40,I=50,E=12,K=10,routing=minus1,seed=15",
)
"""Case lines of the quick tier."""
FEATURES = (
    "T=17,H=72,I=40,E=8,K=3,router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5,seed=21",
    "T=9,H=40,I=48,E=12,K=4,router=softmax:bias:zero_experts=4:scale=6,seed=22",
    "T=15,H=24,I=32,E=8,K=3,router=sigmoid:renorm=sum,logits=deep,routing=trailing,seed=24",
    "T=31,H=64,I=25,E=5,K=2,router=softmax:renorm=sum,logits=nan,seed=23",
    "T=33,H=104,I=72,E=8,K=2,layout=batched,routing=minus1,seed=25",
    "T=33,H=72,I=50,E=12,K=3,ep=2,ep_rank=1,routing=minus1,seed=26",
    "T=17,H=72,I=40,E=5,K=2,dtype=fp32,routing=beyond,relation=flip,seed=27",
    "T=9,H=64,I=40,E=5,K=2,router=sigmoid:renorm=sum:fused_shared=1,seed=28",
    "T=17,H=72,I=48,E=5,K=2,act=silu:limit=1,values=clamp,seed=29",
    "T=17,H=40,I=48,E=5,K=3,act=swigluoai,expert_bias=1,seed=30",
    "T=15,H=64,I=50,E=5,K=1,act=gelu_no_mul,weight_on_input=1,relation=split,seed=31",
    "T=17,H=40,I=32,E=5,K=3,act=gelu,shared=24,scale_on_sum=2.5,seed=32",
    "T=17,H=40,I=25,E=12,K=3,act=swiglustep:limit=1,layout=batched,ep=3,ep_rank=2,placement=round_robin,values=clamp,seed=33",
    "T=9,H=72,I=50,E=5,K=4,dtype=fp16,layout=batched,storage=KN,routing=dup,values=tagged,relation=relabel,seed=34",
    "T=33,H=40,I=48,E=6,K=4,dtype=fp32,values=cancel,relation=duplicate,seed=35",
    "T=31,H=64,I=32,E=5,K=3,act=silu_no_mul,inplace=1,routing=hot_last,values=wide,relation=double,seed=36",
)
"""Case lines that the default tier adds: routers, layouts, ranks, activations and flags that quick has none of."""
FAR = ("T=3,H=40,I=24,E=5,K=2,huge=1,seed=37", "T=5,H=24,I=40,E=3,K=2,dtype=fp16,huge=1,values=int,seed=38")
"""Case lines of the far tier."""


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
    if tier == "far":
        return [parse_case(line) for line in FAR]
    cases = [parse_case(line) for line in QUICK]
    if tier == "quick":
        return cases
    cases += [parse_case(line) for line in FEATURES]
    cases += [case for scheme in KINDS for case in scheme_cases(scheme)]
    if tier != "default":
        cases += [case for scheme in QUANTISED if scheme not in KINDS for case in scheme_cases(scheme)]
        cases += [case for _, case in preset_cases()]
        cases += [*(case for case in covering() if case.ranks == 1), *sample_quantised(200)]
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
