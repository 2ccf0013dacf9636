"""The families: one row per block of transformers, in the vocabulary of Router, Activation and Problem."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .build import Dims, Family

Options = dict[str, Any]

RENORMALISED = "softmax:renorm=sum"
DEEPSEEK = "sigmoid:bias:groups={groups}/{keep}:top2:renorm=eps/1e-20:scale=2.5"
ONE_GROUP = "sigmoid:bias:renorm=eps/1e-20:scale=2.5"


class Gemma4Moe(nn.Module):
    """Router and experts of Gemma 4, which the decoder layer calls one after the other (here on the same input)."""

    def __init__(self, module: Any, config: Any) -> None:
        super().__init__()
        self.router, self.experts = module.Gemma4TextRouter(config), module.Gemma4TextExperts(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.reshape(-1, x.shape[-1])
        _, weights, ids = self.router(x)
        result: torch.Tensor = self.experts(x, ids, weights)
        return result


def _local(d: Dims) -> Options:
    return {"hidden_size": d.H, "intermediate_size": d.I, "num_local_experts": d.E, "num_experts_per_tok": d.K}


def _moe(d: Dims) -> Options:
    return {"hidden_size": d.H, "moe_intermediate_size": d.I, "num_experts": d.E, "num_experts_per_tok": d.K}


def _plain(d: Dims) -> Options:
    return {"hidden_size": d.H, "intermediate_size": d.I, "num_experts": d.E, "num_experts_per_tok": d.K}


def _qwen(d: Dims) -> Options:
    return _moe(d) | {"shared_expert_intermediate_size": d.shared, "norm_topk_prob": True}


def _grouped(d: Dims, groups: int, keep: int, shared: int = 2, scale: float = 2.5) -> Options:
    base = {"hidden_size": d.H, "moe_intermediate_size": d.I, "num_experts_per_tok": d.K, "n_routed_experts": d.E}
    base |= {"num_attention_heads": 2}
    return base | {"n_group": groups, "topk_group": keep, "n_shared_experts": shared, "routed_scaling_factor": scale}


def _deepseek(d: Dims) -> Options:
    return _grouped(d, d.groups, d.groups // 2) | {"norm_topk_prob": True}


def _deepseek_v2(d: Dims) -> Options:
    return _grouped(d, d.groups, d.groups // 2, scale=16.0) | {"topk_method": "group_limited_greedy"}


def _one_group(d: Dims) -> Options:
    return _grouped(d, 1, 1) | {"norm_topk_prob": True}


def _deepseek_v4(d: Dims) -> Options:
    sizes = {"hidden_size": d.H, "moe_intermediate_size": d.I, "n_routed_experts": d.E, "num_experts_per_tok": d.K}
    kinds = {"num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"], "vocab_size": 32}
    return sizes | kinds | {"swiglu_limit": 1.0, "routed_scaling_factor": 1.5}


def _nemotron(d: Dims) -> Options:
    return _one_group(d) | {"moe_shared_expert_intermediate_size": d.shared, "mlp_hidden_act": "relu2"}


def _transposed(d: Dims) -> Options:
    return {"storage": "KN"}


_FAMILIES = (
    Family("mixtral", "mixtral", "MixtralConfig", "MixtralSparseMoeBlock", RENORMALISED, _local),
    Family(
        "qwen2_moe",
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        "softmax",
        lambda d: _qwen(d) | {"norm_topk_prob": False},
        shared=lambda d: d.shared,
        shared_path="shared_expert",
        shared_gate=True,
    ),
    Family(
        "qwen3_next",
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextSparseMoeBlock",
        RENORMALISED,
        _qwen,
        shared=lambda d: d.shared,
        shared_path="shared_expert",
        shared_gate=True,
    ),
    Family("olmoe", "olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock", "softmax", _plain),
    Family("granitemoe", "granitemoe", "GraniteMoeConfig", "GraniteMoeMoE", "softmax_topk", _local, router_path="router"),
    Family(
        "aria",
        "aria",
        "AriaTextConfig",
        "AriaTextMoELayer",
        "softmax_topk",
        lambda d: {
            "hidden_size": d.H,
            "intermediate_size": d.I,
            "moe_num_experts": d.E,
            "moe_topk": d.K,
            "moe_num_shared_experts": 2,
            "num_attention_heads": 2,
        },
        router_path="router",
        shared=lambda d: d.shared,
        flags=_transposed,
    ),
    Family(
        "dbrx",
        "dbrx",
        "DbrxConfig",
        "DbrxFFN",
        "softmax:renorm=lp/1",
        lambda d: {
            "d_model": d.H,
            "ffn_config": {
                "hidden_size": d.H,
                "ffn_hidden_size": d.I,
                "moe_num_experts": d.E,
                "moe_top_k": d.K,
                "moe_normalize_expert_weights": 1.0,
            },
        },
        router_path="router",
    ),
    Family(
        "phimoe",
        "phimoe",
        "PhimoeConfig",
        "PhimoeSparseMoeBlock",
        "sparsemixer:jitter_eps=0.1",
        lambda d: _local(d) | {"router_jitter_noise": 0.1},
        router_path="router",
        k=2,
    ),
    Family(
        "ernie4_5_moe",
        "ernie4_5_moe",
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeSparseMoeBlock",
        "softmax:bias:renorm=floor/1e-12",
        lambda d: {
            "hidden_size": d.H,
            "moe_intermediate_size": d.I,
            "moe_num_experts": d.E,
            "moe_k": d.K,
            "moe_num_shared_experts": 2,
        },
        shared=lambda d: d.shared,
        bias_path="gate.moe_statics.e_score_correction_bias",
    ),
    Family(
        "gemma4",
        "gemma4",
        "Gemma4TextConfig",
        "",
        "softmax:expert_scale:renorm=sum",
        lambda d: {"hidden_size": d.H, "moe_intermediate_size": d.I, "num_experts": d.E, "top_k_experts": d.K},
        act="gelu_tanh",
        router_path="router",
        make=Gemma4Moe,
    ),
    Family(
        "deepseek_v2",
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        "softmax:groups={groups}/{keep}:rejected=zero:scale=16",
        _deepseek_v2,
        shared=lambda d: d.shared,
    ),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        DEEPSEEK,
        _deepseek,
        shared=lambda d: d.shared,
        bias_path="gate.e_score_correction_bias",
    ),
    Family(
        "deepseek_v4",
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        "sqrtsoftplus:bias:renorm=eps/1e-20:scale=1.5",
        _deepseek_v4,
        act="silu:limit=1",
        shared=lambda d: d.I,
        bias_path="gate.e_score_correction_bias",
        args=(1,),
    ),
    Family(
        "deepseek_v4_hash",
        "deepseek_v4",
        "DeepseekV4Config",
        "DeepseekV4SparseMoeBlock",
        "sqrtsoftplus:table:renorm=eps/1e-20:scale=1.5",
        _deepseek_v4,
        act="silu:limit=1",
        shared=lambda d: d.I,
        args=(0,),
    ),
    Family(
        "minimax_m2",
        "minimax_m2",
        "MiniMaxM2Config",
        "MiniMaxM2SparseMoeBlock",
        "sigmoid:bias:renorm=sum",
        _local,
        bias_path="e_score_correction_bias",
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        "GptOssConfig",
        "GptOssMLP",
        "softmax_topk",
        lambda d: _local(d) | {"swiglu_limit": 1.0},
        act="swigluoai:limit=1",
        router_path="router",
        flags=lambda d: {"storage": "KN", "expert_bias": True},
    ),
    Family(
        "llama4",
        "llama4",
        "Llama4TextConfig",
        "Llama4TextMoe",
        "sigmoid",
        _local,
        router_path="router",
        shared=lambda d: d.I,
        shared_path="shared_expert",
        gain=0.7,
        k=1,
        flags=lambda d: {"storage": "KN", "weight_on_input": True},
    ),
    Family(
        "hy_v3",
        "hy_v3",
        "HYV3Config",
        "HYV3MoE",
        "sigmoid:bias:renorm=eps/1e-20:scale=2.826",
        lambda d: _moe(d) | {"num_shared_experts": 2, "router_scaling_factor": 2.826},
        shared=lambda d: d.shared,
        bias_path="e_score_correction_bias",
    ),
    Family(
        "flint",
        "flint",
        "FlintConfig",
        "FlintSparseMoeBlock",
        "sigmoid:renorm=sum",
        _qwen,
        shared=lambda d: d.shared,
        shared_path="shared_expert",
    ),
    Family(
        "nemotron_h",
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHMoE",
        ONE_GROUP,
        _nemotron,
        act="relu2_no_mul",
        shared=lambda d: d.shared,
        bias_path="gate.e_score_correction_bias",
    ),
    Family(
        "nemotron_h_latent",
        "nemotron_h",
        "NemotronHConfig",
        "NemotronHMoE",
        ONE_GROUP,
        lambda d: _nemotron(d) | {"moe_latent_size": d.H // 2},
        act="relu2_no_mul",
        shared=lambda d: d.shared,
        bias_path="gate.e_score_correction_bias",
        flags=lambda d: {"latent": d.H // 2},
    ),
    Family(
        "longcat_flash",
        "longcat_flash",
        "LongcatFlashConfig",
        "LongcatFlashMoE",
        "softmax:bias:scale=6:zero_experts={zero}",
        lambda d: {
            "hidden_size": d.H,
            "expert_ffn_hidden_size": d.I,
            "n_routed_experts": d.E,
            "zero_expert_num": d.E // 4,
            "moe_topk": d.K,
            "routed_scaling_factor": 6.0,
        },
        router_path="router",
        bias_path="router.e_score_correction_bias",
    ),
)

FAMILIES: dict[str, Family] = {f.name: f for f in _FAMILIES}
"""The families of docs/models.md whose blocks differ in meaning: tested on every variant, with misreadings, and stored."""

_V3: Options = {"shared": lambda d: d.shared, "bias_path": "gate.e_score_correction_bias"}
_SMOKE = (
    Family("minimax", "minimax", "MiniMaxConfig", "MiniMaxSparseMoeBlock", RENORMALISED, _local),
    Family("qwen3_moe", "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock", RENORMALISED, _qwen),
    Family("qwen3_vl_moe", "qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextSparseMoeBlock", RENORMALISED, _qwen),
    Family(
        "qwen3_5_moe",
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeSparseMoeBlock",
        RENORMALISED,
        _qwen,
        shared=lambda d: d.shared,
        shared_path="shared_expert",
        shared_gate=True,
    ),
    Family("flex_olmo", "flex_olmo", "FlexOlmoConfig", "FlexOlmoSparseMoeBlock", "softmax", _plain, k=5),
    Family("mellum", "mellum", "MellumConfig", "MellumSparseMoeBlock", RENORMALISED, _qwen),
    Family("jamba", "jamba", "JambaConfig", "JambaSparseMoeBlock", "softmax", _plain, router_path="router"),
    Family(
        "hunyuan_v1_moe",
        "hunyuan_v1_moe",
        "HunYuanMoEV1Config",
        "HunYuanMoEV1Moe",
        RENORMALISED,
        lambda d: {"hidden_size": d.H, "intermediate_size": d.I, "num_experts": d.E, "moe_topk": d.K},
        shared=lambda d: d.I,
        shared_path="shared_mlp",
    ),
    Family("deepseek_v32", "deepseek_v32", "DeepseekV32Config", "DeepseekV32MoE", DEEPSEEK, _deepseek, **_V3),
    Family("dots1", "dots1", "Dots1Config", "Dots1MoE", DEEPSEEK, _deepseek, **_V3),
    Family("glm4_moe", "glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE", DEEPSEEK, _deepseek, **_V3),
    Family("glm4_moe_lite", "glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteMoE", DEEPSEEK, _deepseek, **_V3),
    Family("glm_moe_dsa", "glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE", DEEPSEEK, _deepseek, **_V3),
    Family("solar_open", "solar_open", "SolarOpenConfig", "SolarOpenMoE", DEEPSEEK, _deepseek, **_V3),
    Family(
        "glm5_next",
        "glm5_next",
        "Glm5NextTextConfig",
        "Glm5NextTextMoE",
        DEEPSEEK,
        lambda d: _deepseek(d) | {"swiglu_limit": 1.0, "num_attention_heads": 64},
        act="silu:limit=1",
        **_V3,
    ),
    Family(
        "mimo_v2_flash",
        "mimo_v2_flash",
        "MiMoV2FlashConfig",
        "MiMoV2FlashMoE",
        DEEPSEEK,
        _deepseek,
        bias_path="gate.e_score_correction_bias",
    ),
    Family(
        "deepseek_v2_lite",
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        "softmax",
        lambda d: _grouped(d, 1, 1, scale=1.0) | {"topk_method": "greedy"},
        shared=lambda d: d.shared,
    ),
)
SMOKE: dict[str, Family] = {f.name: f for f in _SMOKE}
"""Other names for the same semantics: one plain run each."""
