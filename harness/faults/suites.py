"""Input recipes of public suites as data: their shapes and scales, cut to what a laptop runs in milliseconds.

A recipe is remembered by what decides how much a rule can see: rms of the pre-activations, rms of the output, spread of
the router's logits, E, K and T. Widths are cut to H=64, I=48 and both rms values are kept, so that tolerances meet the
magnitudes they meet in their own suite. Sources: docs/peers.md (measured output rms) and docs/tolerances.md section 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.quant_inputs import quantise_weights, static_scales
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor
H, I = 64, 48  # noqa: E741
QUANTISED_H, QUANTISED_I = 256, 128
"""Widths that groups of 32 and 128 divide."""


@dataclass(frozen=True)
class Suite:
    """`pre` rms of the pre-activations, `out` rms of the output, `spread` standard deviation of the router's logits."""

    name: str
    rule: str
    T: int
    E: int
    K: int
    pre: float
    out: float
    spread: float = 1.0
    dtype: str = "bf16"
    scheme: str = "none"


SUITES: tuple[Suite, ...] = (
    # x and w are N(0, 0.1): pre = 0.01 sqrt(K of the GEMM).
    Suite("vLLM fused_moe k128 e64 t6", "vLLM fused_moe", 33, 64, 6, 0.113, 4.5e-3),
    Suite("vLLM fused_moe k128 e8 t2", "vLLM fused_moe", 33, 8, 2, 0.113, 1.3e-2),
    Suite("vLLM fused_moe k1024 e8 t2", "vLLM fused_moe", 64, 8, 2, 0.32, 7.3e-2),
    Suite("vLLM modular t4", "vLLM modular", 64, 32, 4, 0.32, 1.0e-2),
    # w is N(0, 1/15).
    Suite("vLLM batched k2048 e8 t2", "vLLM batched", 64, 8, 2, 0.30, 4.5e-2),
    Suite("vLLM batched k128 e64 t6", "vLLM batched", 45, 64, 6, 0.075, 3.8e-4),
    # everything N(0, 0.01), logits too: all routing weights are alike.
    Suite("SGLang fused_moe k1024 e64 t6", "SGLang fused_moe", 64, 64, 6, 3.2e-3, 6.4e-8, 0.01),
    Suite("SGLang mean-rel e8 t2", "SGLang mean-rel", 64, 8, 2, 0.3, 7.4e-3),
    # pre-activations near 1 are assumed where the suite's scales were not read.
    Suite("FlashInfer check_accuracy e32 t2", "FlashInfer check_accuracy", 64, 32, 2, 1.0, 1.8e-1),
    Suite("FlashInfer trtllm-gen e128 t8", "FlashInfer trtllm-gen", 64, 128, 8, 1.0, 1.0),
    Suite("FlashInfer fuzz e32 t4", "FlashInfer fuzz", 64, 32, 4, 16.0, 2.8e2),
    Suite("FlashInfer-Bench e32 t8", "FlashInfer-Bench", 64, 32, 8, 1.0, 1.0),
    Suite("DeepGEMM bf16 e8 t2", "DeepGEMM", 64, 8, 2, 1.0, 2.6e-1),
    Suite("DeepGEMM fp8 e8 t2", "DeepGEMM fp8", 64, 8, 2, 1.0, 2.6e-1),
    Suite("DeepEP bf16 e8 t2", "DeepEP", 64, 8, 2, 1.0, 2.6e-1),
    # w is N(0, 0.02).
    Suite("Liger bf16 e8 t2", "Liger", 64, 8, 2, 0.32, 8.9e-3),
    # x and w are N(0, 1).
    Suite("triton_kernels e16 t4", "triton_kernels", 64, 16, 4, 32.0, 9.1e3),
    Suite("torch.testing fp32 e8 t2", "torch.testing", 64, 8, 2, 1.0, 1.0, dtype="fp32"),
    Suite("TransformerEngine bf16 e8 t2", "TransformerEngine", 64, 8, 2, 1.0, 1.0),
    Suite("KernelBench bf16 e8 t2", "KernelBench", 64, 8, 2, 1.0, 1.0),
    # Quantised: the middle of the output rms that docs/tolerances.md measured for the suite, or 1 where it was not.
    Suite("vLLM block fp8 e8 t2", "vLLM block fp8", 64, 8, 2, 0.5, 0.1, scheme="fp8_block"),
    Suite("SGLang block fp8 e8 t2", "SGLang mean-rel", 64, 8, 2, 0.5, 0.1, scheme="fp8_block"),
    Suite("DeepGEMM block fp8 e8 t2", "DeepGEMM fp8", 64, 8, 2, 1.0, 0.26, scheme="fp8_block"),
    Suite("DeepEP block fp8 e8 t2", "DeepEP fp8", 64, 8, 2, 1.0, 0.26, scheme="fp8_block"),
    Suite("FlashInfer block fp8 e32 t4", "FlashInfer fp8 block", 64, 32, 4, 1.0, 2.0, scheme="fp8_block"),
    Suite("FlashInfer fuzz fp8 e32 t4", "FlashInfer fuzz fp8", 64, 32, 4, 1.0, 1.0, scheme="fp8_block"),
    Suite("vLLM cutlass fp8 token e8 t2", "vLLM cutlass fp8", 64, 8, 2, 0.3, 0.05, scheme="fp8_token"),
    Suite("vLLM cutlass fp8 tensor e8 t2", "vLLM cutlass fp8", 64, 8, 2, 0.3, 0.05, scheme="fp8_tensor_static"),
    Suite("torch scaled_mm fp8 token e8 t2", "torch scaled_mm", 64, 8, 2, 1.0, 1.0, scheme="fp8_token"),
    Suite("vLLM int8 e8 t2", "vLLM fused_moe", 64, 8, 2, 0.3, 0.05, scheme="int8_token"),
    Suite("vLLM wna16 e8 t2", "vLLM wna16", 64, 8, 2, 0.3, 0.05, scheme="int4_w4a16_zp_g32"),
    Suite("vLLM nvfp4 e40 t4", "vLLM nvfp4", 64, 40, 4, 0.1, 0.01, scheme="nvfp4"),
    Suite("FlashInfer fuzz nvfp4 e32 t4", "FlashInfer fuzz nvfp4", 64, 32, 4, 1.0, 1.0, scheme="nvfp4"),
    Suite("vLLM mxfp4 e8 t2", "vLLM mxfp4", 64, 8, 2, 1.0, 1.0, scheme="mxfp4_w4a8"),
    Suite("triton_kernels mxfp8 e16 t4", "triton_kernels mx", 64, 16, 4, 1.0, 1.0, scheme="mxfp8"),
)


def make(suite: Suite, seed: int) -> Inputs:
    """Random normals at the suite's scale; weights are softmax over the chosen logits. Clean shapes, nothing else drawn."""
    wide, deep = (H, I) if suite.scheme == "none" else (QUANTISED_H, QUANTISED_I)
    router = Router("softmax", renorm="sum")
    p = Problem(T=suite.T, H=wide, I=deep, E=suite.E, K=suite.K, dtype=suite.dtype, scheme=suite.scheme, router=router)
    dtype = p.fmt.dtype

    def normal(name: str, *shape: int) -> Tensor:
        return Stream(seed, f"suite/{name}").normal(*shape)

    logits = normal("logits", p.T, p.E) * suite.spread
    chosen = logits.sort(dim=-1, descending=True, stable=True)
    ids, weights = chosen.indices[:, : p.K], chosen.values[:, : p.K].softmax(-1)
    inputs = Inputs(
        replace(p, scheme="none"),
        normal("x", p.T, wide).to(dtype),
        ids.int(),
        weights.float(),
        (normal("w1", p.E, 2 * deep, wide) * (suite.pre / math.sqrt(wide))).to(dtype),
        normal("w2", p.E, wide, deep).to(dtype),
        logits=logits.float(),
    )
    rms = float(_plain(inputs).square().mean().sqrt())
    inputs = replace(inputs, w2=(inputs.w2.double() * (suite.out / rms)).to(dtype))
    return _quantised(inputs, p) if p.quant.quantised else inputs


def _quantised(inputs: Inputs, p: Problem) -> Inputs:
    """The weights' codes and scales, and the static scales: four times beyond the largest value, where the scheme has them."""
    made = {n: v for name in ("w1", "w2") for n, v in quantise_weights(getattr(inputs, name).double(), name, p).items()}
    scales = static_scales(p, "normal", lambda name: Stream(1, f"suite/{name}"), inputs.device)
    return replace(inputs, problem=p, **made, **scales)


def _plain(inputs: Inputs) -> Tensor:
    """float64 (T, H): the layer without any rounding, to set the scale of w2 by."""
    x = inputs.hidden_states.double()
    out = torch.zeros_like(x)
    for e in range(inputs.w1.shape[0]):
        t, k = (inputs.topk_ids == e).nonzero(as_tuple=True)
        g, u = (x[t] @ inputs.w1[e].double().T).chunk(2, -1)
        out.index_add_(0, t, inputs.topk_weights[t, k, None].double() * ((g * g.sigmoid() * u) @ inputs.w2[e].double().T))
    return out
