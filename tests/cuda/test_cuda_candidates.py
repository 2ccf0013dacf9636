"""The candidates: which problems each takes, with reasons, and that every pair of backends meets at every seam."""

from __future__ import annotations

from itertools import pairwise, product

import pytest

from moeproof.harness.cases.presets import PRESETS, preset
from moeproof.optimized import candidates as triton
from moeproof.optimized.cuda import candidates as cuda
from moeproof.optimized.cuda import stages
from moeproof.reference.contract import Problem

PLAIN = "T=4,H=16,I=8,E=4,K=2"
MIXES = set(cuda.MIXES)
QUANTISERS = "cuda-quantisers"


def problem(line: str) -> Problem:
    return Problem.from_options(dict(part.split("=", 1) for part in line.split(",")))


@pytest.mark.parametrize(
    ("line", "supporters", "reason"),
    [
        (PLAIN, MIXES, ""),
        (f"{PLAIN},dtype=fp16", {"cuda-triton-gemm"}, "bf16 only"),
        (f"{PLAIN},expert_bias=1", {"cuda-triton-gemm"}, "adds no bias"),
        ("T=4,H=16,I=7,E=4,K=2", {"cuda-triton-gemm"}, "rows of whole 16 bytes"),
        ("T=4,H=16,I=8,E=1500,K=2", set(), "at most 1024"),
        ("T=4,H=16,I=8,E=64,K=40", {"cuda-triton-gemm"}, "at most 32 slots"),
        (f"{PLAIN},layout=batched,capacity=4", set(), "standard layout"),
        (f"{PLAIN},latent=8", set(), "latent"),
        (f"{PLAIN},ep=2,shared=8", set(), "ep > 1"),
        (f"{PLAIN},scheme=fp8_block", {QUANTISERS}, "quantised experts are not implemented"),
        ("T=4,H=128,I=128,E=4,K=2,scheme=int4_w4a8", {QUANTISERS}, ""),
        (f"{PLAIN},scheme=fp8_tensor", set(), "no amax over a whole tensor"),
        (f"{PLAIN},scheme=fp8_w8a16", set(), "quantises no activations"),
        ("T=4,H=32,I=32,E=4,K=2,scheme=nvfp4", set(), "does not know e2m1 by rule two_level_decode"),
    ],
)
def test_support_is_declared(line: str, supporters: set[str], reason: str) -> None:
    answers = {c.name: c.supports(problem(line)) for c in cuda.candidates()}

    assert {name for name, words in answers.items() if words is None} == supporters
    assert any(reason in (words or "") for words in answers.values())


def test_every_pair_of_backends_meets_at_every_seam() -> None:
    """Layout agreement is where backends break."""
    mixes = [*cuda.MIXES.values(), ()]  # the last is the `triton` candidate
    for before, after in pairwise(stages.NAMES):
        met = {(before in mix, after in mix) for mix in mixes}

        assert met == set(product((True, False), repeat=2)), (before, after)


def test_a_mix_takes_each_stage_from_its_backend() -> None:
    mix = stages.mix(("align", "act"))

    assert (mix.align, mix.act) == (stages.CUDA.align, stages.CUDA.act)
    assert (mix.route, mix.gemm1, mix.combine) == (stages.TRITON.route, stages.TRITON.gemm1, stages.TRITON.combine)


def test_names_are_new() -> None:
    assert not {c.name for c in cuda.candidates()} & {c.name for c in triton.candidates()}
    assert {c.name for c in cuda.candidates()} == MIXES | {QUANTISERS}
    assert all(c.backend == "cuda" for c in cuda.candidates())


def test_most_presets_run_on_cuda_stages() -> None:
    """Around Triton's product every model's layer, but for those with a latent width."""
    refused = {name: words for name in PRESETS if (words := cuda.unsupported(preset(name), cuda.MIXES["cuda-triton-gemm"]))}

    assert all("latent" in words for words in refused.values()), refused
