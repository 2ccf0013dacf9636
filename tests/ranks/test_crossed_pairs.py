"""Prepare/finalize for several ranks with the quantised experts of optimized/, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.registry import load_rank_pairs
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import ContractError

SIZES = "T=5,H=64,I=32,E=5,K=2"
FRONTS = {
    "standard": ("eager-allgather", "eager-alltoall", "eager-alltoall-overlapped"),
    "batched": ("eager-batched-alltoall",),
}
EXPERTS = {
    "standard": ("triton-fp8-modular", "triton-quant-modular"),
    "batched": ("triton-fp8-batched", "triton-quant-batched"),
}
CASES = {
    "fp8_tensor": "values=hetero,routing=minus1,spread=uneven",
    "fp8_token": "values=pin,routing=dup,spread=empty",
    "mxfp8": "values=groups,expert_bias=1,placement=round_robin",
    "int8_token": "values=groups,routing=minus1,spread=uneven",
    "nvfp4": "values=pin,routing=uniform,spread=one",
    "int4_w4a16_zp_g32": "values=groups,routing=zipf,redundant=2",
}
"""Of each kind of scale one: of a tensor on its source, of tokens, exponents, two levels, none on x."""


@pytest.fixture(scope="module", params=[1, 2, 3])
def session(request: pytest.FixtureRequest) -> Iterator[RankSession]:
    session = RankSession(request.param, "gloo" if not torch.cuda.is_available() else "symm", deadline=120)
    yield session
    session.close()


@pytest.mark.parametrize("layout", FRONTS)
def test_each_front_with_each_experts(session: RankSession, layout: str) -> None:
    """By turns: every scheme meets every front over the world sizes, and the experts that serve it."""
    passed = set()
    for n, (scheme, extra) in enumerate(CASES.items()):
        front = FRONTS[layout][(n + session.ranks) % len(FRONTS[layout])]
        options = f"{SIZES},scheme={scheme},layout={layout},ranks={session.ranks},{extra},seed={n + 3}"
        if session.ranks == 1:
            options = ",".join(
                part for part in options.split(",") if part.split("=")[0] not in ("spread", "redundant", "ranks")
            )
        case = parse_case(options)
        for experts in EXPERTS[layout]:
            name = f"{front}+{experts}"
            verdict = session.judge(name, *load_rank_pairs([name]), case)
            assert verdict.outcome in (Outcome.PASS, Outcome.UNSUPPORTED), str(verdict)
            if verdict.outcome is Outcome.PASS:
                passed.add(scheme)
                assert {"rows", "y", "out"} <= verdict.worst.keys() or "overlapped" in front

    assert len(passed) >= len(CASES) - 1, "fp8_tensor has no micro-batches"


def test_names_that_do_not_go_together() -> None:
    with pytest.raises(ContractError, match="works on the standard layout and triton-fp8-batched on the batched one"):
        load_rank_pairs(["eager-alltoall+triton-fp8-batched"])
    with pytest.raises(ContractError, match="experts 'nobody' is not known; allowed: "):
        load_rank_pairs(["eager-alltoall+nobody"])
    with pytest.raises(ContractError, match="candidate 'nobody' is not known"):
        load_rank_pairs(["nobody+triton-fp8-modular"])
