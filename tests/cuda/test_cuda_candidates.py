"""The candidates: which problems each takes, with reasons, and that every pair of backends meets at every seam."""

from __future__ import annotations

from itertools import product
from types import ModuleType

import cuda_emulator
import pytest

from moeproof.harness.cases.presets import PRESETS, preset
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.registry import load_candidates
from moeproof.optimized import candidates as triton
from moeproof.optimized.cuda import batched, quant_stages, scaled_gemm, stages
from moeproof.optimized.cuda import candidates as cuda
from moeproof.reference.contract import ContractError, Problem

PLAIN = "T=4,H=16,I=8,E=4,K=2"
MIXES = {*cuda.MIXES, "cuda-modular"}
AROUND = {"cuda-triton-gemm"}
BATCHED = {*cuda.BATCHED_MIXES}
QUANTISERS = {"cuda-quant-triton-gemm"}
HOPPER = {*QUANTISERS, "cuda-fp8", "triton-quant-cuda-gemm", "cuda-fp8-modular"}


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the machine is asked of a machine with an H100 and a toolkit."""
    monkeypatch.setattr(scaled_gemm, "unsupported", cuda_emulator.unsupported)


def problem(line: str) -> Problem:
    return Problem.from_options(dict(part.split("=", 1) for part in line.split(",")))


@pytest.mark.parametrize(
    ("line", "supporters", "reason"),
    [
        (PLAIN, MIXES, ""),
        (f"{PLAIN},dtype=fp16", AROUND, "bf16 only"),
        (f"{PLAIN},expert_bias=1", AROUND, "adds no bias"),
        ("T=4,H=16,I=7,E=4,K=2", AROUND, "rows of whole 16 bytes"),
        ("T=4,H=16,I=8,E=1500,K=2", set(), "at most 1024"),
        ("T=4,H=16,I=8,E=64,K=40", AROUND, "at most 32 slots"),
        (f"{PLAIN},layout=batched,capacity=4", BATCHED, "standard layout"),
        (f"{PLAIN},layout=batched,capacity=4,dtype=fp16", {"cuda-batched-triton-gemm"}, "bf16 only"),
        (f"{PLAIN},layout=batched,capacity=4,scheme=fp8_block", set(), "quantised experts are not implemented"),
        (f"{PLAIN},latent=8", set(), "latent"),
        (f"{PLAIN},ep=2,shared=8", set(), "ep > 1"),
        (f"{PLAIN},shared=8", {*cuda.MIXES}, "routed experts only"),
        (f"{PLAIN},scheme=fp8_block", QUANTISERS, "quantised experts are not implemented"),
        ("T=4,H=32,I=32,E=4,K=2,scheme=fp8_token", HOPPER, ""),
        ("T=4,H=32,I=32,E=4,K=2,scheme=fp8_token,dtype=fp16", QUANTISERS, "gives bf16 only"),
        ("T=4,H=128,I=128,E=4,K=2,scheme=int4_w4a8", QUANTISERS, ""),
        (f"{PLAIN},scheme=fp8_tensor", set(), "no amax over a whole tensor"),
        (f"{PLAIN},scheme=fp8_w8a16", set(), "quantises no activations"),
        ("T=4,H=32,I=32,E=4,K=2,scheme=nvfp4", set(), "two levels"),
    ],
)
def test_support_is_declared(line: str, supporters: set[str], reason: str) -> None:
    answers = {c.name: c.supports(problem(line)) for c in map(as_candidate, cuda.candidates())}

    assert {name for name, words in answers.items() if words is None} == supporters
    assert any(reason in (words or "") for words in answers.values())


@pytest.mark.parametrize(
    ("mixes", "seams"),
    [(cuda.MIXES, stages.SEAMS), (cuda.QUANT_MIXES, quant_stages.SEAMS), (cuda.BATCHED_MIXES, batched.SEAMS)],
    ids=["plain", "quantised", "batched"],
)
def test_every_pair_of_backends_meets_at_every_seam(
    mixes: dict[str, tuple[str, ...]], seams: tuple[tuple[str, str], ...]
) -> None:
    """Layout agreement is where backends break. The last mix is the candidate whose stages are all Triton's."""
    for before, after in seams:
        met = {(before in mix, after in mix) for mix in [*mixes.values(), ()]}

        assert met == set(product((True, False), repeat=2)), (before, after)


@pytest.mark.parametrize("where", [stages, quant_stages, batched])
def test_a_mix_takes_each_stage_from_its_backend(where: ModuleType) -> None:
    for name in where.NAMES:
        mix = where.mix((name,))

        assert {n for n in where.NAMES if getattr(mix, n) is getattr(where.CUDA, n)} == {name}
        assert all(getattr(mix, n) is getattr(where.TRITON, n) for n in where.NAMES if n != name)


def test_a_user_mixes_stages_by_name() -> None:
    (plain,) = load_candidates(["moeproof.optimized.cuda.mixed:route_combine"])
    (quant,) = load_candidates(["moeproof.optimized.cuda.mixed:quant_align"])

    assert plain.supports(problem(PLAIN)) is None
    assert plain.supports(problem(f"{PLAIN},dtype=fp16")) is None  # Triton's product
    assert quant.supports(problem("T=4,H=32,I=32,E=4,K=2,scheme=fp8_token")) is None
    with pytest.raises(ContractError, match="'route_sort' names no mix of stages: sort is not known; allowed: route, weigh"):
        load_candidates(["moeproof.optimized.cuda.mixed:route_sort"])


def test_names_are_new() -> None:
    assert not {c.name for c in cuda.candidates()} & {c.name for c in triton.candidates()}
    assert {c.name for c in cuda.candidates()} == MIXES | HOPPER | BATCHED
    assert all(c.backend == "cuda" for c in cuda.candidates())


def test_most_presets_run_on_cuda_stages() -> None:
    """Around Triton's product every model's layer, but for those with a latent width."""
    refused = {name: words for name in PRESETS if (words := cuda.unsupported(preset(name), cuda.MIXES["cuda-triton-gemm"]))}

    assert all("latent" in words for words in refused.values()), refused
