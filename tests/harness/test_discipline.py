"""Memory discipline, item by item: a fault that nothing else sees, and the one rule that sees it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pipeline
import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.trial import home
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Inputs

Tensor = torch.Tensor
LAYER = "T=17,H=40,I=24,E=5,K=2"
ARGUMENTS = ("hidden_states", "topk_ids", "topk_weights", "w1", "w2", "b1", "b2", "logits", "correction_bias", "expert_map")


def _contiguous_strides(t: Tensor) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(t.shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _ignoring_strides(name: str) -> Candidate:
    """A kernel that takes one argument for contiguous, whatever its strides say."""
    (healthy,) = load_candidates(["eager-stages"])

    def run(i: Inputs) -> object:
        t = getattr(i, name)
        # As a kernel does with a bare pointer: the strides are its own idea.
        return healthy.run(i.map({name: t.as_strided(t.shape, _contiguous_strides(t))}))

    return replace(healthy, name="flat", run=run)  # type: ignore[arg-type]


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_every_argument_arrives_as_a_strided_view(argument: str) -> None:
    """P89 for each argument by itself: right on contiguous tensors, wrong on views."""
    line = f"{LAYER},expert_bias=1,router=softmax:bias:renorm=sum,ep=2,seed=5"
    candidate = _ignoring_strides(argument)
    plain, views = (judge(candidate, parse_case(line + more), "cpu") for more in ("", ",strided=1"))

    assert plain.outcome is Outcome.PASS, plain
    assert views.outcome in (Outcome.FAIL, Outcome.ERROR), views  # poison taken for ids may raise


def test_quantised_arguments_arrive_as_strided_views_too() -> None:
    line = "T=17,H=64,I=64,E=5,K=2,scheme=int4_w4a16_zp_g32,values=groups,seed=5"
    for argument in ("w1_scale", "w2_scale", "w1_zp", "w2_zp"):
        verdict = judge(_ignoring_strides(argument), parse_case(f"{line},strided=1"), "cpu")
        assert verdict.outcome in (Outcome.FAIL, Outcome.ERROR), argument  # what lies between the scales may be refused as one


def _reads_before_the_start(i: Inputs) -> Tensor:
    """P90: an id of -1 makes row -1 of w2's first column, in front of the tensor, part of a sum that should leave it out."""
    out = pipeline.Pipeline()(i)["out"]
    w = i.w2
    before = w.as_strided(w.shape[1:], w.stride()[1:], w.storage_offset() - w.stride(0))
    dead = (i.topk_ids < 0).any(dim=1)
    return out + torch.where(dead, before[0, 0].float() * 1e-30, 0.0).to(out.dtype)[:, None]


def test_what_lies_before_a_tensor_is_poison() -> None:
    """The addend is far below every bound: only a NaN in front of w2 shows that it was read."""
    case = parse_case(f"{LAYER},routing=minus1,seed=5")
    inputs = make_inputs(case)
    assert bool((inputs.topk_ids < 0).any())
    verdict = judge(Candidate("early", _reads_before_the_start), case, "cpu")

    assert verdict.outcome is Outcome.FAIL, verdict
    everything = judge(Candidate("early", _reads_before_the_start), parse_case(f"{LAYER},seed=5"), "cpu")
    assert everything.outcome is Outcome.PASS, everything


FREE_LISTS = """
import torch
from moeproof.harness.judging.memory import dirty
found = 0
for _ in range(20):
    dirty(torch.device("cpu"))
    found += bytes(torch.UntypedStorage(1 << 13))[64:128] == bytes([255]) * 64
print(found)
"""


def test_freed_memory_is_dirty_before_a_call() -> None:
    """What a kernel allocates behind torch's back comes from the allocator's free lists: they hold 0xFF, not zeros.

    In a process of its own: which block a full heap hands out is the allocator's business.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, "-c", FREE_LISTS], capture_output=True, text=True, env=environment, check=True)

    assert int(done.stdout) > 10


def test_a_claim_of_batch_invariance_is_held_to_its_bits() -> None:
    """Determinism class `batch`: another order of sums for another number of tokens is legal for everybody else."""

    def by_count(i: Inputs) -> Tensor:
        out = pipeline.Pipeline()(i)["out"]
        return torch.nextafter(out, out * 2) if i.problem.T != 17 else out

    for claim, outcome in (("batch", Outcome.FAIL), ("run", Outcome.PASS)):
        claims = replace(Candidate("x", by_count).claims, deterministic=claim)
        verdict = judge(
            Candidate("by-count", by_count, claims=claims), parse_case(f"{LAYER},dtype=fp32,relation=split,seed=3"), "cpu"
        )
        assert verdict.outcome is outcome, verdict


def test_the_oracle_of_a_small_case_lives_on_the_cpu_and_that_of_a_whole_layer_on_the_gpu() -> None:
    assert home(parse_case(f"{LAYER},seed=1"), "cuda") == "cpu"
    assert home(parse_case("model=mixtral-8x7b,T=64"), "cuda") == "cuda"
    assert home(parse_case(f"{LAYER},huge=1"), "cuda") == "cuda", "what it spans must not be copied through the host"
    assert home(parse_case(f"{LAYER},seed=1"), "cpu") == "cpu"
