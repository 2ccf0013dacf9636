"""Acceptance rules of public suites, as data: (result, reference) -> accepted. Sources and measured blind spots: docs/peers.md.

Written anew from the rules' published form. They judge the whole output only, as their suites do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
Accept = Callable[[Tensor, Tensor, torch.dtype], bool]

DEFAULTS = {torch.bfloat16: (1.6e-2, 1e-5), torch.float16: (1e-3, 1e-5), torch.float32: (1.3e-6, 1e-5)}
"""torch.testing.assert_close: (rtol, atol) by dtype."""


@dataclass(frozen=True)
class Rule:
    """`accept(got, want, dtype)` on float64 tensors (T, H)."""

    name: str
    source: str
    accept: Accept


def close(rtol: float, atol: float) -> Accept:
    """Every element within atol + rtol |want|."""
    return lambda got, want, _: bool(torch.isclose(got, want, rtol=rtol, atol=atol).all())


def close_by_dtype(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    rtol, atol = DEFAULTS[dtype]
    return close(rtol, atol)(got, want, dtype)


def share_close(rtol: float, atol: float, share: float) -> Accept:
    """A share of the elements within atol + rtol |got|: the relative part multiplies the result."""
    return lambda got, want, _: float(torch.isclose(want, got, rtol=rtol, atol=atol).double().mean()) >= share


def calc_diff(limit: float, shift: float = 0.0) -> Accept:
    """1 - 2 <x, y> / (<x, x> + <y, y>) over the whole tensor."""

    def accept(got: Tensor, want: Tensor, _: torch.dtype) -> bool:
        x, y = got + shift, want + shift
        total = float((x * x + y * y).sum())
        return total == 0 or 1 - 2 * float((x * y).sum()) / total < limit

    return accept


def max_and_rms(most: float, rms: float) -> Accept:
    """Error relative to max(rms of the reference, |want|): its largest and its root mean square."""

    def accept(got: Tensor, want: Tensor, _: torch.dtype) -> bool:
        scale = torch.maximum(want.abs(), want.square().mean().sqrt()).clamp(min=1e-30)
        error = (got - want) / scale
        return float(error.abs().max()) <= most and float(error.square().mean().sqrt()) <= rms

    return accept


def mean_relative(limit: float) -> Accept:
    return lambda got, want, _: bool((got - want).abs().mean() < limit * want.abs().mean())


def of_maximum(share: float, rtol: float) -> Accept:
    """Within share * max |want| + 1e-3 + rtol |want|."""
    return lambda got, want, _: bool(((got - want).abs() <= share * want.abs().max() + 1e-3 + rtol * want.abs()).all())


def within_deviation(share: float) -> Accept:
    """A share of the elements within max(0.05, 1.5 standard deviations) or 50%."""

    def accept(got: Tensor, want: Tensor, _: torch.dtype) -> bool:
        error = (got - want).abs()
        fine = (error <= max(0.05, 1.5 * float(want.std()))) | (error <= 0.5 * want.abs())
        return float(fine.double().mean()) >= share

    return accept


def share_of_want(rtol: float, share: float) -> Accept:
    """A share of the elements within rtol |want|."""
    return lambda got, want, _: float(((got - want).abs() <= rtol * want.abs()).double().mean()) >= share


def signal_to_noise(decibels: float) -> Accept:
    """20 log10 of |want| / |error|, over the whole tensor."""

    def accept(got: Tensor, want: Tensor, _: torch.dtype) -> bool:
        error, signal = float((got - want).norm()), float(want.norm())
        return error == 0 or signal >= error * 10 ** (decibels / 20)

    return accept


def share_both(limit: float, share: float) -> Accept:
    """An element is bad where its absolute and its relative error both exceed the limit."""

    def accept(got: Tensor, want: Tensor, _: torch.dtype) -> bool:
        error = (got - want).abs()
        bad = ~((error <= limit) | (error <= limit * want.abs()))
        return float(bad.double().mean()) <= 1 - share

    return accept


RULES: dict[str, Rule] = {
    r.name: r
    for r in (
        Rule("torch.testing", "assert_close defaults by dtype", close_by_dtype),
        Rule("TransformerEngine", "tests/pytorch/utils.py: the same (rtol, atol) by dtype", close_by_dtype),
        Rule("vLLM fused_moe", "tests/kernels/moe/test_moe.py: atol 2e-2, rtol 0", close(0.0, 2e-2)),
        Rule("vLLM modular", "test_modular_kernel_combinations.py: 3e-2, 3e-2", close(3e-2, 3e-2)),
        Rule("vLLM batched", "test_batched_moe.py: atol 3e-2, rtol 2e-2", close(2e-2, 3e-2)),
        Rule("SGLang fused_moe", "test_fused_moe.py: atol 1e-2, rtol 1e-1", close(1e-1, 1e-2)),
        Rule("SGLang mean-rel", "test_block_fp8.py: mean |error| < 2% of mean", mean_relative(2e-2)),
        Rule("FlashInfer trtllm-gen", "0.1 + 0.85 |got| on 92.5%", share_close(0.85, 0.1, 0.925)),
        Rule("FlashInfer check_accuracy", "97% in max(0.05, 1.5 std) or 50%", within_deviation(0.97)),
        Rule("FlashInfer fuzz", "0.05 max + 1e-3 + 5%", of_maximum(0.05, 0.05)),
        Rule("FlashInfer-Bench", "abs > 1e-2 and rel > 1e-2 on at most 5%", share_both(1e-2, 0.95)),
        Rule("DeepGEMM", "calc_diff < 1e-5 (bf16)", calc_diff(1e-5)),
        Rule("DeepGEMM fp8", "calc_diff < 1e-3", calc_diff(1e-3)),
        Rule("DeepEP", "calc_diff(+1) < 5e-6 (bf16)", calc_diff(5e-6, 1.0)),
        Rule("Liger", "test_fused_moe.py bf16: atol 1e-1, rtol 1e-2", close(1e-2, 1e-1)),
        Rule("triton_kernels", "max 2e-2, rms 4e-3 of max(rms, |want|)", max_and_rms(2e-2, 4e-3)),
        Rule("vLLM block fp8", "test_block_fp8.py: 3.5e-2, 3.5e-2", close(3.5e-2, 3.5e-2)),
        Rule("vLLM cutlass fp8", "test_cutlass_moe.py: atol 5e-2, rtol 1e-2", close(1e-2, 5e-2)),
        Rule("vLLM nvfp4", "test_nvfp4_moe.py: 1e-1, 1e-1", close(1e-1, 1e-1)),
        Rule("vLLM wna16", "test_moe.py: atol 2e-2, rtol 0", close(0.0, 2e-2)),
        Rule("vLLM mxfp4", "30% on 80%", share_of_want(0.3, 0.8)),
        Rule("FlashInfer fp8 block", "0.1 + 0.85 |got| on 79%", share_close(0.85, 0.1, 0.79)),
        Rule("FlashInfer fuzz fp8", "0.15 max + 1e-3 + 85%", of_maximum(0.15, 0.85)),
        Rule("FlashInfer fuzz nvfp4", "0.15 max + 1e-3 + 10%", of_maximum(0.15, 0.1)),
        Rule("DeepEP fp8", "calc_diff(+1) < 5e-4", calc_diff(5e-4, 1.0)),
        Rule("triton_kernels mx", "max 0.4, rms 4e-2 of max(rms, |want|)", max_and_rms(0.4, 4e-2)),
        Rule("torch scaled_mm", "test_scaled_matmul_cuda.py: SQNR >= 22 dB", signal_to_noise(22.0)),
        Rule("KernelBench", "1e-2, 1e-2", close(1e-2, 1e-2)),
    )
}
