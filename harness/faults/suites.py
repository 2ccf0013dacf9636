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
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor
H, I = 64, 48  # noqa: E741


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
)


def make(suite: Suite, seed: int) -> Inputs:
    """Random normals at the suite's scale; weights are softmax over the chosen logits. Clean shapes, nothing else drawn."""
    p = Problem(T=suite.T, H=H, I=I, E=suite.E, K=suite.K, dtype=suite.dtype, router=Router("softmax", renorm="sum"))
    dtype = p.fmt.dtype

    def normal(name: str, *shape: int) -> Tensor:
        return Stream(seed, f"suite/{name}").normal(*shape)

    logits = normal("logits", p.T, p.E) * suite.spread
    chosen = logits.sort(dim=-1, descending=True, stable=True)
    ids, weights = chosen.indices[:, : p.K], chosen.values[:, : p.K].softmax(-1)
    inputs = Inputs(
        p,
        normal("x", p.T, H).to(dtype),
        ids.int(),
        weights.float(),
        (normal("w1", p.E, 2 * I, H) * (suite.pre / math.sqrt(H))).to(dtype),
        normal("w2", p.E, H, I).to(dtype),
        logits=logits.float(),
    )
    rms = float(_plain(inputs).square().mean().sqrt())
    return replace(inputs, w2=(inputs.w2.double() * (suite.out / rms)).to(dtype))


def _plain(inputs: Inputs) -> Tensor:
    """float64 (T, H): the layer without any rounding, to set the scale of w2 by."""
    x = inputs.hidden_states.double()
    out = torch.zeros_like(x)
    for e in range(inputs.w1.shape[0]):
        t, k = (inputs.topk_ids == e).nonzero(as_tuple=True)
        g, u = (x[t] @ inputs.w1[e].double().T).chunk(2, -1)
        out.index_add_(0, t, inputs.topk_weights[t, k, None].double() * ((g * g.sigmoid() * u) @ inputs.w2[e].double().T))
    return out
