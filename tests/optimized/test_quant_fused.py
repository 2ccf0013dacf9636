"""The fused fp8 layer: every kind of plan on ragged cases of both schemes, through the judge."""

from __future__ import annotations

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.optimized.align import align
from moeproof.optimized.plans import Plan
from moeproof.optimized.quant import fused
from moeproof.optimized.slots import Slots
from moeproof.optimized.sort_rows import sort_rows
from moeproof.reference.contract import Candidate, Claims

KINDS = {
    "pointers": "16x64x128-g1-w4-s4 16x32x128-g2-w4-s4",
    "descriptors, whole groups": "32x256x128-g1-w4-s4-tma 32x64x128-g1-w4-s3-tma",
    "persistent": "64x256x128-g4-w8-s4-tma-p1-bulk 64x128x128-g2-w4-s4-tma-p2-flat",
    "swapped": "16x128x128-g1-w4-s4-swap 16x64x128-g1-w4-s4-tma-swap",
    "in the tensor core": "16x128x128-g1-w4-s4-fast 16x64x128-g1-w4-s4-swap-fast",
    "roles": "128x256x128-g8-w4-s4-tma-p1-roles 128x256x128-g8-w4-s4-tma-p1-roles",
    "strips": "v64x256-w4-s1 v32x512-w4-s1",
}
CASES = (
    "T=11,H=272,I=144,E=3,K=2,routing=dup",
    "T=18,H=144,I=272,E=2,K=1,routing=minus1",
    "T=9,H=400,I=128,E=5,K=3,dtype=fp16,act=swigluoai,expert_bias=1,scale_on_sum=2.5,values=hetero",
    "T=7,H=136,I=130,E=4,K=2,act=relu2_no_mul,shared=16,strided=1",
)
"""Ragged everywhere: groups that end inside a step, gate and up rows in other blocks of scales, rows no descriptor names."""


def check(plan: str, line: str) -> None:
    claims = Claims(accumulate="fp8_unpromoted" if "fast" in plan else "fp8_promoted", ties="lowest", total_router=True)
    candidate = Candidate(
        name="fused-fp8",
        run=lambda inputs: fused.run_plan(inputs, Plan.parse(plan)),
        shows=("xq", "xs", "sorted_slots", "block_expert", "num_padded", "y", "out"),
        claims=claims,
        backend="triton",
    )
    verdict = judge(candidate, parse_case(line))

    assert verdict.outcome is Outcome.PASS, str(verdict)


@pytest.mark.parametrize("place", range(len(KINDS)))
def test_kinds(place: int) -> None:
    """Each kind with a scheme and a case; ci/every_plan.py --scheme runs every plan over more of them."""
    check(list(KINDS.values())[place], f"{CASES[place % 4]},scheme={fused.SCHEMES[(place + place // 4) % 2]}")


@pytest.mark.parametrize(("kind", "scheme"), [("persistent", "fp8_block"), ("swapped", "fp8_token"), ("strips", "fp8_block")])
def test_exact_probe(kind: str, scheme: str) -> None:
    """Powers of two as scales, and no rounding anywhere: every bit must agree."""
    check(KINDS[kind], f"T=7,H=256,I=256,E=3,K=2,scheme={scheme},values=pin,routing=minus1")


def test_no_tokens() -> None:
    from moeproof.harness.cases.inputs import make_inputs

    for plan in (KINDS["strips"], KINDS["pointers"]):
        inputs = make_inputs(parse_case("T=0,H=128,I=128,E=4,K=2,scheme=fp8_block"))
        assert fused.run_plan(inputs, Plan.parse(plan))["out"].shape == (0, 128)


def test_sorted_rows() -> None:
    """Codes of each position's row, zeros in padding, nothing behind the blocks in use."""
    ids = torch.tensor([[1, 0], [-1, 1], [0, 1]], dtype=torch.int32)
    alignment = align(Slots(ids, 2, 2), 16)
    codes = torch.randint(1, 120, (3, 20), dtype=torch.uint8)
    got = sort_rows(codes.view(torch.float8_e4m3fn), alignment, 2).view(torch.uint8)
    want = torch.zeros(32, 20, dtype=torch.uint8)
    want[[0, 1]], want[[16, 17, 18]] = codes[[0, 2]], codes[[0, 1, 2]]

    assert torch.equal(got[:32], want)
