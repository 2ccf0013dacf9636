"""Real models as data: `preset("deepseek-v3")` is that model's layer, `preset("deepseek-v3/small")` its CPU twin.

Sizes are the released models', not class defaults. Sources, by letter, as docs/models.md explains them: C transformers 5.23.0
config class, V vLLM 0.33.0 source, M Megatron-LM modelopt confs, S slime model scripts, H published config or page, R vLLM
recipes, T shapes in vLLM's tuned-config names, m from memory. A row with an m in its source is not `verified`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

TOKENS = 16
SMALL_EXPERTS = 16
SMALL_WIDTH = 256


@dataclass(frozen=True)
class Preset:
    """One model's MoE layer. `problem` has T=1 as a placeholder; `preset(name)` gives it tokens."""

    name: str
    problem: Problem
    source: str
    """Letters of the module docstring."""
    released: str = "bf16"
    """Precisions it is released or commonly run in; `problem` itself is unquantised."""
    note: str = ""
    """What the model has around the layer that `problem` does not hold, or what differs between its implementations."""

    @property
    def verified(self) -> bool:
        """Every size was read somewhere: none is from memory."""
        return "m" not in self.source

    @property
    def scale(self) -> str:
        """What `scaled` divides by, e.g. `H/32 I/8 E/16`; empty where the model is small already."""
        small = scaled(self.problem)
        pairs = ((n, getattr(self.problem, n), getattr(small, n)) for n in ("H", "I", "E", "shared", "latent"))
        return " ".join(f"{n}/{full / tiny:.3g}" for n, full, tiny in pairs if tiny and full != tiny)


SOFTMAX = "softmax"
RENORMALISED = "softmax:renorm=sum"
OVER_SELECTED = "softmax_topk"
SIGMOID = "sigmoid:bias:renorm=eps/1e-20"  # the DeepSeek-V3 rule with one group, which is no group
GROUPED = "sigmoid:bias:groups=8/4:top2:renorm=eps/1e-20:scale=2.5"
SWIGLUOAI = "swigluoai"
ONE_GROUP = "n_group 1: plain top-k"


def _row(
    name: str,
    source: str,
    sizes: tuple[int, int, int, int],
    router: str,
    *,
    act: str = "silu",
    released: str = "bf16",
    note: str = "",
    **flags: int | bool | str | float,
) -> Preset:
    """One line of the table. `sizes` is (E, K, H, I); `flags` are further fields of Problem."""
    E, K, H, I = sizes  # noqa: E741  (the field's letter)
    options = {"act": Activation.parse(act), "router": Router.parse(router)} | flags
    return Preset(name, Problem(T=1, E=E, K=K, H=H, I=I, **options), source, released, note)  # type: ignore[arg-type]


FP8 = "bf16, fp8"
FP8_BLOCK = "bf16, fp8 block 128, nvfp4"
DEEPSEEK = "fp8 block 128, nvfp4"
KIMI = "fp8 block, int4 group 32, nvfp4, mxfp4"
GLM = "bf16, fp8, nvfp4"

_ROWS = (
    # softmax over all experts
    _row("mixtral-8x7b", "C", (8, 2, 4096, 14336), RENORMALISED),
    _row("mixtral-8x22b", "m", (8, 2, 6144, 16384), RENORMALISED),
    _row("minimax-text-01", "m", (32, 2, 6144, 9216), RENORMALISED),
    _row("qwen1.5-moe-a2.7b", "CH", (60, 4, 2048, 1408), SOFTMAX, shared=5632, shared_gate=True),
    _row("qwen2-57b-a14b", "Hm", (64, 8, 3584, 2560), SOFTMAX, shared=20480, shared_gate=True, note="shared width from memory"),
    _row("qwen3-30b-a3b", "MSH", (128, 8, 2048, 768), RENORMALISED, released=FP8_BLOCK),
    _row("qwen3-235b-a22b", "MSH", (128, 8, 4096, 1536), RENORMALISED, released=FP8_BLOCK),
    _row("qwen3-coder-480b", "m", (160, 8, 6144, 2560), RENORMALISED, released=FP8_BLOCK),
    _row("qwen3-next-80b", "CS", (512, 10, 2048, 512), RENORMALISED, shared=512, shared_gate=True, released=FP8_BLOCK),
    _row("qwen3.5-35b-a3b", "CS", (256, 8, 2048, 512), RENORMALISED, shared=512, shared_gate=True, released=FP8_BLOCK),
    _row("qwen3.5-397b-a17b", "m", (512, 10, 4096, 1024), RENORMALISED, shared=1024, shared_gate=True, released=FP8_BLOCK),
    _row("olmoe-1b-7b", "Cm", (64, 8, 2048, 1024), SOFTMAX, note="I from memory"),
    _row("flexolmo", "C", (7, 5, 4096, 11008), SOFTMAX),
    _row("mellum2-12b", "C", (64, 8, 2304, 896), RENORMALISED),
    _row("jamba-1.5-mini", "C", (16, 2, 4096, 14336), SOFTMAX),
    _row("jamba-1.5-large", "m", (16, 2, 8192, 24576), SOFTMAX),
    _row("hunyuan-a13b", "m", (64, 8, 4096, 3072), RENORMALISED, shared=3072, released="bf16, fp8, nvfp4, gptq int4"),
    _row("dbrx", "m", (16, 4, 6144, 10752), "softmax:renorm=lp/1"),
    _row("ernie-4.5-21b-a3b", "C", (64, 6, 2560, 1536), "softmax:bias:renorm=floor/1e-12", shared=3072, released=FP8),
    _row("ernie-4.5-300b-a47b", "m", (64, 8, 8192, 3584), "softmax:bias:renorm=floor/1e-12", released=FP8),
    _row(
        "gemma-4-26b-a4b",
        "Tm",
        (128, 8, 2816, 704),
        "softmax:expert_scale:renorm=sum",
        act="gelu_tanh",
        note="H from memory; the router sees a normalised, rescaled input; a dense MLP runs in parallel",
    ),
    _row("deepseek-v2", "H", (160, 6, 5120, 1536), "softmax:groups=8/3:rejected=zero:scale=16", shared=3072),
    _row("deepseek-v2-lite", "M", (64, 6, 2048, 1408), SOFTMAX, shared=2816),
    _row("ling-lite", "H", (64, 6, 2048, 1408), RENORMALISED, shared=2816),
    _row("ling-plus", "H", (64, 4, 5376, 3072), RENORMALISED, shared=3072),
    _row("step-3", "m", (48, 3, 7168, 5120), RENORMALISED, shared=5120, note="renormalisation is set by the config"),
    _row(
        "longcat-flash",
        "CH",
        (512, 12, 6144, 2048),
        "softmax:bias:scale=6:zero_experts=256",
        released=FP8,
    ),
    _row("grok-1", "H", (8, 2, 6144, 32768), "softmax:softcap=30", act="gelu"),
    _row("grok-2", "H", (8, 2, 8192, 16384), "softmax:softcap=30", act="gelu", note="a dense MLP of 32768 in parallel"),
    _row("arctic", "m", (128, 2, 7168, 4864), RENORMALISED, note="a dense MLP in parallel"),
    # sparsemixer
    _row("phi-3.5-moe", "C", (16, 2, 4096, 6400), "sparsemixer"),
    # softmax over the selected logits
    _row("granite-3-1b-a400m", "Tm", (32, 8, 1024, 512), OVER_SELECTED, note="the layer multiplies by residual_multiplier"),
    _row(
        "granite-4-h-small",
        "Tm",
        (72, 10, 4096, 768),
        OVER_SELECTED,
        shared=1536,
        note="shared MLP at layer level; the layer multiplies by residual_multiplier",
    ),
    _row("aria", "m", (64, 6, 2560, 1664), OVER_SELECTED, shared=3328, storage="KN"),
    _row(
        "gpt-oss-20b",
        "CM",
        (32, 4, 2880, 2880),
        OVER_SELECTED,
        act=SWIGLUOAI,
        expert_bias=True,
        storage="KN",
        released="mxfp4 weights, bf16 activations",
        note="the router has a bias",
    ),
    _row(
        "gpt-oss-120b",
        "CM",
        (128, 4, 2880, 2880),
        OVER_SELECTED,
        act=SWIGLUOAI,
        expert_bias=True,
        storage="KN",
        released="mxfp4 weights, bf16 activations",
        note="the router has a bias",
    ),
    # sigmoid
    _row(
        "llama4-scout",
        "CM",
        (16, 1, 5120, 8192),
        "sigmoid",
        weight_on_input=True,
        shared=8192,
        storage="KN",
        released="bf16, fp8 per channel, nvfp4",
        note="selects by logit; sigmoid is monotone",
    ),
    _row(
        "llama4-maverick",
        "CM",
        (128, 1, 5120, 8192),
        "sigmoid",
        weight_on_input=True,
        shared=8192,
        storage="KN",
        released="bf16, fp8 per channel, nvfp4",
        note="every second layer",
    ),
    _row("deepseek-v3", "CMSH", (256, 8, 7168, 2048), GROUPED, shared=2048, released=DEEPSEEK),
    _row("deepseek-v3-ep8", "CMSH", (256, 8, 7168, 2048), GROUPED, released=DEEPSEEK, ep=8, ep_rank=0, note="rank 0 of EP8"),
    _row("kimi-k2", "MS", (384, 8, 7168, 2048), f"{SIGMOID}:scale=2.827", shared=2048, released=KIMI, note=ONE_GROUP),
    _row("moonlight-16b", "S", (64, 6, 2048, 1408), f"{SIGMOID}:scale=2.446", shared=2816, note=ONE_GROUP),
    _row("kimi-linear-48b", "C", (256, 8, 2304, 1024), f"{SIGMOID}:scale=2.446", shared=1024, note=ONE_GROUP),
    _row(
        "kimi-k3",
        "RHm",
        (896, 16, 7168, 3072),
        SIGMOID,
        act="situ:beta=4:linear_beta=25",
        shared=6144,
        latent=3584,
        latent_norm=True,
        released="mxfp4, nvfp4",
        note="router rule assumed to be Kimi-K2's",
    ),
    _row("glm-4.5", "S", (160, 8, 5120, 1536), f"{SIGMOID}:scale=2.5", shared=1536, released=GLM, note=ONE_GROUP),
    _row("glm-4.5-air", "CSH", (128, 8, 4096, 1408), SIGMOID, shared=1408, released=GLM, note=ONE_GROUP),
    _row("glm-4.7-flash", "CS", (64, 4, 2048, 1536), f"{SIGMOID}:scale=1.8", shared=1536, released=GLM, note=ONE_GROUP),
    _row("glm-5", "CS", (256, 8, 6144, 2048), f"{SIGMOID}:scale=2.5", shared=2048, released=f"{GLM}, mxfp4", note=ONE_GROUP),
    _row("glm-5-next", "C", (288, 8, 4096, 2048), f"{SIGMOID}:scale=2.5", act="silu:limit=10", shared=2048, note=ONE_GROUP),
    _row("dots.llm1", "m", (128, 6, 4096, 1408), f"{SIGMOID}:scale=2.5", shared=2816),
    _row("solar-open-100b", "C", (128, 8, 4096, 1280), SIGMOID, shared=1280, note=ONE_GROUP),
    _row("ling-mini-2.0", "H", (256, 8, 2048, 512), GROUPED, shared=512, note="float32 router"),
    _row("ling-1t", "Hm", (256, 8, 8192, 2048), GROUPED, shared=2048, released=FP8, note="H and I from memory; float32 router"),
    _row("exaone-moe", "C", (64, 8, 4096, 1024), f"{SIGMOID}:scale=2.5", shared=1024, note=f"class default; {ONE_GROUP}"),
    _row("k-exaone", "m", (128, 8, 6144, 2048), f"{SIGMOID}:scale=2.5", shared=2048),
    _row("mimo-v2-flash", "C", (256, 8, 4096, 2048), SIGMOID, released="fp8", note=ONE_GROUP),
    _row("minimax-m2", "CS", (256, 8, 3072, 1536), "sigmoid:bias:renorm=sum", released="fp8 block 128, nvfp4"),
    _row(
        "hy3",
        "C",
        (192, 8, 4096, 1536),
        f"{SIGMOID}:scale=2.826",
        shared=1536,
        released="bf16, fp8, nvfp4",
        note="the shared expert is added in float32",
    ),
    _row("flint", "C", (256, 6, 2048, 512), "sigmoid:renorm=sum", shared=1024),
    _row(
        "nemotron-3-nano",
        "MT",
        (128, 6, 2688, 1856),
        f"{SIGMOID}:scale=2.5",
        act="relu2_no_mul",
        shared=3712,
        released="bf16, fp8, nvfp4",
        note=ONE_GROUP,
    ),
    # sqrt(softplus)
    _row(
        "deepseek-v4-flash",
        "CH",
        (256, 6, 4096, 2048),
        "sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
        act="silu:limit=10",
        shared=2048,
        released="fp8, fp4 experts with e8m0 scales, nvfp4",
    ),
    _row(
        "deepseek-v4-flash-hash",
        "CH",
        (256, 6, 4096, 2048),
        "sqrtsoftplus:table:renorm=eps/1e-20:scale=1.5",
        act="silu:limit=10",
        shared=2048,
        released="fp8, fp4 experts with e8m0 scales, nvfp4",
        note="the first 3 layers: ids from a token-id table",
    ),
    _row(
        "deepseek-v4-pro",
        "CHm",
        (384, 6, 7168, 3072),
        "sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
        act="silu:limit=10",
        shared=3072,
        released="fp8, fp4 experts with e8m0 scales, nvfp4",
        note="H, I and the shared width from memory",
    ),
)

PRESETS: dict[str, Preset] = {row.name: row for row in _ROWS}


def preset(name: str, T: int = TOKENS) -> Problem:
    """The layer of model `name` at full size with T tokens; `name/small` is its `scaled` twin.

    Raises ContractError, listing close names, where the model is not known.
    """
    model, slash, size = name.partition("/")
    check(not slash or size == "small", f"model '{name}': after the slash only 'small' is allowed")
    if model not in PRESETS:
        close = difflib.get_close_matches(model.lower(), PRESETS, n=5, cutoff=0.4)
        hint = f"did you mean {', '.join(close)}?" if close else f"allowed: {', '.join(PRESETS)}"
        raise ContractError(f"model '{model}' is not known; {hint}")
    problem = PRESETS[model].problem
    return scaled(problem, T) if slash else replace(problem, T=T)


def scaled(problem: Problem, T: int = TOKENS, experts: int = SMALL_EXPERTS, width: int = SMALL_WIDTH) -> Problem:
    """The same layer small enough for a laptop: routing, activation, packing, storage, biases and K are kept.

    Widths (H, I, shared, latent) are each halved until they are at most `width`; a bit that falls out is kept as an odd
    last one. So a ragged width stays ragged: 2880 -> 180, 1408 -> 176, 1407 -> 175, and only powers of two become 256.

    E is halved while it is above `experts`, even, and leaves a legal problem with more experts than K; identity experts
    shrink with it. The odd factor survives: 60 -> 15, 160 -> 10, 288 -> 9. Where halving sticks above the cap, E becomes the
    cap if that is legal (72 experts, K=10 -> 16), else it stays (896 experts, K=16 -> 28).
    """
    sizes = {name: _halved(getattr(problem, name), width) for name in ("H", "I", "shared", "latent")}
    small = replace(problem, T=T, **sizes)  # type: ignore[arg-type]
    while experts < small.E and small.E % 2 == 0:
        fewer = _with_experts(small, small.E // 2)
        if fewer is None:
            break
        small = fewer
    if experts < small.E:
        small = _with_experts(small, experts) or small
    return small


def _halved(size: int, limit: int) -> int:
    lost = 0
    while size > limit:
        lost |= size & 1
        size >>= 1
    return size | lost


def _with_experts(problem: Problem, E: int) -> Problem | None:
    """`problem` with E experts and as many identity experts in proportion, or None where that is no legal problem."""
    router = problem.router
    zero = max(1, router.zero_experts * E // problem.E) if router.zero_experts else 0
    if problem.K >= E < problem.E:
        return None
    try:
        return replace(problem, E=E, router=replace(router, zero_experts=zero))
    except ContractError:
        return None
