"""The layer on mxfp4 weights: every kind of tile on ragged cases, through the judge.

The interpreter has no assembly: the general decoder stands for it, and the instructions are checked here one by one."""

from __future__ import annotations

import re

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.optimized.plans import Plan
from moeproof.optimized.quant import packed, packed_gemm
from moeproof.optimized.quant.packed_gemm import LARGEST_LOW, _assembly, _low
from moeproof.reference.contract import Candidate, Claims, ContractError

KINDS = {
    "rows on the left": "16x64x128-g1-w4-s3 16x32x256-g2-w4-s3",
    "weights on the left": "32x128x256-g1-w4-s3-swap 32x64x128-g1-w4-s3-swap",
    "sums apart": "32x128x256-g1-w4-s3-swap-apart 32x64x128-g1-w4-s3-swap-apart",
    "persistent": "64x64x128-g4-w4-s3-p1 64x128x128-g2-w4-s3-p2",
}
CASES = (
    "T=11,H=288,I=160,E=3,K=2,routing=dup",
    "T=18,H=160,I=96,E=2,K=1,routing=minus1",
    "T=9,H=416,I=128,E=5,K=3,act=swigluoai,expert_bias=1,scale_on_sum=2.5,values=hetero",
    "T=7,H=32,I=64,E=4,K=2,act=relu2_no_mul,shared=16,strided=1",
    "T=7,H=256,I=256,E=3,K=2,values=pin,routing=minus1",
)


@pytest.mark.parametrize(("kind", "line"), [*zip(KINDS, CASES, strict=False), *zip(reversed(KINDS), CASES[3:], strict=False)])
def test_kinds(kind: str, line: str) -> None:
    candidate = Candidate(
        name="fused-mxfp4",
        run=lambda inputs: packed.run_plan(inputs, Plan.parse(KINDS[kind])),
        shows=("sorted_slots", "block_expert", "num_padded", "y", "out"),
        claims=Claims(ties="lowest", total_router=True),
        backend="triton",
    )
    verdict = judge(candidate, parse_case(f"{line},scheme={packed.SCHEME}"))

    assert verdict.outcome is Outcome.PASS, str(verdict)


def test_high_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel for them, where every bit must agree."""
    monkeypatch.setattr(packed_gemm, "_low", lambda scale: False)
    test_kinds("weights on the left", CASES[-1])


def run_assembly(text: str, words: tuple[int, int], factor: int) -> int:
    """The few PTX instructions that decode a plane, on Python integers."""
    value: dict[str, int] = {"$1": words[0], "$2": words[1], "$3": factor}

    def get(name: str) -> int:
        return value[name] if name in value else int(name, 0)

    for line in re.findall(r"^\s*([a-z][\w.]*) ([^;]*);", text, re.M):
        opcode, (target, *names) = line[0], line[1].split(", ")
        a = [get(name) for name in names] if not opcode.startswith(".") else []
        if opcode == "mov.b32":
            result = a[0]
        elif opcode == "prmt.b32":
            both = a[0] | a[1] << 32
            result = sum((both >> 8 * (a[2] >> 4 * i & 15) & 255) << 8 * i for i in range(4))
        elif opcode == "mul.lo.u32":
            result = a[0] * a[1] & 0xFFFFFFFF
        elif opcode == "shr.b32":
            result = a[0] >> a[1]
        elif opcode == "and.b32":
            result = a[0] & a[1]
        else:
            assert opcode == "mul.rn.bf16x2"
            result = _bits(_halves(a[0]) * _halves(a[1]))
        value[target] = result
    return value["$0"]


def _halves(word: int) -> torch.Tensor:
    return torch.tensor([word & 0xFFFF, word >> 16], dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()


def _bits(pair: torch.Tensor) -> int:
    low, high = (int(x) & 0xFFFF for x in pair.to(torch.bfloat16).view(torch.int16))
    return low | high << 16


@pytest.mark.parametrize("r", range(8))
def test_assembly_decodes_every_code(r: int) -> None:
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for code in range(16):
        for other in (0, 5, 15):
            for scale in (1, 100, 127, 128, 200, 250):
                noise = 0x9A3C71E5
                first, second = ((noise & ~(15 << 4 * r)) | c << 4 * r for c in (code, other))
                want = [(-1.0 if c > 7 else 1.0) * table[c & 7] * 2.0 ** (scale - 127) for c in (code, other)]

                assert _halves(run_assembly(_assembly(r, False), (first, second), (scale << 7) * 0x10001)).tolist() == want
                if scale <= LARGEST_LOW:
                    assert (
                        _halves(run_assembly(_assembly(r, True), (first, second), (scale + 126 << 7) * 0x10001)).tolist()
                        == want
                    )


def test_weights_that_are_no_words_are_refused() -> None:
    from moeproof.optimized.quant.packed_gemm import words

    with pytest.raises(ContractError, match="neighbours"):
        words(torch.zeros(2, 32, 64, dtype=torch.uint8).transpose(1, 2))


def test_low_scales_are_looked_at_again_when_they_change() -> None:
    scale = torch.full((2, 4, 3), LARGEST_LOW, dtype=torch.uint8)
    assert _low(scale)
    scale[1, 2, 0] = LARGEST_LOW + 1

    assert not _low(scale)
