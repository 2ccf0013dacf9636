"""P91 on a device: the last kernel launched on the default stream while the caller waits for another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs streams: an NVIDIA GPU")
LAYER = "T=17,H=64,I=48,E=5,K=2,seed=1"


def _layer(stream: Callable[[], torch.cuda.Stream]) -> Candidate:
    """The eager layer; its result is copied to the output on the given stream."""
    eager = as_candidate(load_candidates(["eager"])[0])

    def run(inputs: Inputs) -> torch.Tensor:
        result = eager.run(inputs)
        result = result if isinstance(result, torch.Tensor) else result["out"]
        out = torch.empty_like(result)
        with torch.cuda.stream(stream()):
            out.copy_(result)
        return out

    return Candidate("streams", run)


def test_the_wrong_stream_shows_only_on_a_side_stream() -> None:
    wrong = _layer(torch.cuda.default_stream)

    assert judge(wrong, parse_case(LAYER), "cuda").outcome is Outcome.PASS
    verdict = judge(wrong, parse_case(f"{LAYER},history=stream"), "cuda")
    assert verdict.outcome is Outcome.FAIL
    assert "wrong stream" in verdict.findings[0].message


def test_the_neutral_twin_passes_on_a_side_stream() -> None:
    assert judge(_layer(torch.cuda.current_stream), parse_case(f"{LAYER},history=stream"), "cuda").outcome is Outcome.PASS
