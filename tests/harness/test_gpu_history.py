"""Side stream and CUDA-graph replay on a GPU: each sees a planted fault that a plain call never shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Claims, Inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs need an NVIDIA GPU")
Tensor = torch.Tensor
CASE = parse_case("T=17,H=64,I=32,E=5,K=2,seed=3")


def dense(i: Inputs, ids: Tensor | None = None) -> Tensor:
    """Every expert for every token, in float32: nothing asks the host."""
    ids = i.topk_ids if ids is None else ids
    gate, up = torch.einsum("th,enh->ten", i.hidden_states.float(), i.w1.float()).chunk(2, dim=-1)
    y = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, i.w2.float())
    mine = ids[:, :, None] == torch.arange(i.w1.shape[0], device=ids.device)
    weights = torch.where(mine, i.topk_weights[:, :, None], 0.0).sum(dim=1)
    return (y * weights[:, :, None]).sum(dim=1).to(i.hidden_states.dtype)


def on_the_default_stream(i: Inputs) -> Tensor:
    """P91: the caller's stream is not asked for."""
    with torch.cuda.stream(torch.cuda.default_stream()):
        return dense(i)


class Baked:
    """P92: what the host saw before the capture is used in every replay."""

    def __init__(self) -> None:
        self.ids: Tensor | None = None

    def __call__(self, i: Inputs) -> Tensor:
        if torch.cuda.is_current_stream_capturing():
            return dense(i, self.ids)
        self.ids = i.topk_ids.clone()
        return dense(i)


def _outcome(run: Callable[[Inputs], Tensor], history: str) -> Outcome:
    candidate = Candidate("mine", run, claims=Claims(deterministic="run"))
    return judge(candidate, replace(CASE, history=history), "cuda").outcome


@pytest.mark.parametrize("history", ["none", "stream", "graph"])
def test_a_healthy_layer_passes(history: str) -> None:
    assert _outcome(dense, history) is Outcome.PASS


def test_work_on_the_wrong_stream_is_seen_on_a_side_stream_only() -> None:
    assert _outcome(on_the_default_stream, "none") is Outcome.PASS
    assert _outcome(on_the_default_stream, "stream") is Outcome.FAIL


def test_a_value_baked_at_capture_is_seen_in_a_replay_only() -> None:
    assert _outcome(Baked(), "none") is Outcome.PASS
    assert _outcome(Baked(), "graph") is Outcome.FAIL
