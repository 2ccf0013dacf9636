"""What the CUDA stages refuse before any launch, with the words that name the mend. No GPU and no compiler is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.optimized.align import Alignment
from moeproof.optimized.cuda import library
from moeproof.optimized.cuda.activation import activate
from moeproof.optimized.cuda.align import align, batch_rows
from moeproof.optimized.cuda.combine import combine
from moeproof.optimized.cuda.dispatch import clear_dead, move_rows, weigh_input
from moeproof.optimized.cuda.grouped_gemm import grouped_gemm
from moeproof.optimized.cuda.modular import StagedPrepareFinalize
from moeproof.optimized.cuda.quantise import quantise
from moeproof.optimized.cuda.router import route
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, ContractError, Router

IDS = torch.zeros(4, 2, dtype=torch.int32)
SLOTS = Slots(IDS, 3, 3)
W = torch.ones(4, 2)
SILU = Activation()
BF16 = FORMATS["bf16"]
BLOCK, STATIC = SCHEMES["fp8_block"].a1, SCHEMES["fp8_tensor_static"].a1
assert BLOCK is not None and STATIC is not None


def rows(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype)


def blocks() -> Alignment:
    padded, counts = torch.zeros(1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    return Alignment(torch.zeros(16, dtype=torch.int32), torch.zeros(1, dtype=torch.int32), padded, counts, 16)


REFUSED: list[tuple[str, Callable[[], object]]] = [
    ("logits are|logits is on cpu", lambda: route(torch.zeros(4, 8), Router(), 2)),
    ("K=9 slots but only 8 experts", lambda: route(torch.zeros(4, 8), Router(), 9)),
    ("correction_bias must be given exactly where", lambda: route(torch.zeros(4, 8), Router(bias=True), 2)),
    ("at most 1024 experts, not 1025", lambda: route(torch.zeros(4, 1025), Router(), 2)),
    ("at most 32 slots, not 33", lambda: route(torch.zeros(4, 64), Router(), 33)),
    ("logits is torch.float64, must be one of", lambda: route(torch.zeros(4, 8).double(), Router(), 2)),
    ("topk_ids is on cpu", lambda: align(SLOTS, 16)),
    ("block_m=0", lambda: align(SLOTS, 0)),
    ("at most 1024", lambda: align(Slots(IDS, 2000, 2000), 16)),
    ("capacity=0", lambda: batch_rows(SLOTS, 0)),
    ("x is on cpu", lambda: activate(rows(8, 32), rows(8, 16), SILU)),
    ("needs input \\(8, 32\\), not \\(8, 16\\)", lambda: activate(rows(8, 16), rows(8, 16), SILU)),
    ("output is torch.float32, input torch.bfloat16", lambda: activate(rows(8, 32), rows(8, 16, dtype=torch.float32), SILU)),
    ("8 rows|6 rows, topk_ids 8 slots", lambda: activate(rows(6, 32), rows(6, 16), SILU, slots=SLOTS)),
    ("counts must be contiguous int32", lambda: activate(rows(8, 32), rows(8, 16), SILU, counts=torch.zeros(4))),
    ("y is on cpu", lambda: combine(rows(8, 16), W, SLOTS, rows(4, 16))),
    ("must be \\(rows, 16\\)", lambda: combine(rows(8, 17), W, SLOTS, rows(4, 16))),
    ("topk_weights is torch.bfloat16, must be torch.float32", lambda: combine(rows(8, 16), W.bfloat16(), SLOTS, rows(4, 16))),
    ("they must be equal", lambda: combine(rows(8, 16), W[:3], SLOTS, rows(4, 16))),
    ("must share a dtype", lambda: combine(rows(8, 16), W, SLOTS, rows(4, 16, dtype=torch.float32))),
    ("need x, which is None", lambda: combine(rows(8, 16), W, SLOTS, rows(4, 16), zero_experts=1)),
    ("shared must be contiguous float32 \\(4, 16\\)", lambda: combine(rows(8, 16), W, SLOTS, rows(4, 16), shared_TH=W)),
    ("rows must be contiguous int32 \\(8,\\)", lambda: combine(rows(8, 16), W, SLOTS, rows(4, 16), rows=IDS)),
    ("x is on cpu", lambda: quantise(rows(8, 128), BLOCK, BF16)),
    ("takes rows: \\(R, C\\)", lambda: quantise(rows(2, 8, 128), BLOCK, BF16)),
    ("must be float32 \\(1, 1\\), and none else", lambda: quantise(rows(8, 128), STATIC, BF16)),
    ("8 rows, topk_ids 6 slots", lambda: quantise(rows(8, 128), BLOCK, BF16, slots=Slots(IDS[:3], 3, 3))),
    ("counts must be contiguous int32", lambda: quantise(rows(8, 128), BLOCK, BF16, counts=W)),
    ("output must be torch.bfloat16 \\(8, 64\\)", lambda: quantise(rows(8, 128), BLOCK, BF16, act=SILU, h_RI=rows(8, 128))),
    ("even number of columns, not 129", lambda: quantise(rows(8, 129), BLOCK, BF16, act=SILU)),
    ("must be \\(rows, 16\\)", lambda: move_rows(rows(4, 16), rows(8, 17), 2)),
    ("they must be equal", lambda: move_rows(rows(4, 16), rows(8, 16, dtype=torch.float32), 2)),
    ("rows must be contiguous int32 \\(8,\\)", lambda: move_rows(rows(4, 16), rows(8, 16), 2, rows=IDS)),
    ("weights must be float32 \\(4, 2\\)", lambda: move_rows(rows(4, 16), rows(8, 16), 2, weights_TK=W[:, :1])),
    ("one slot per token", lambda: weigh_input(rows(4, 16), W)),
    ("rows to clear are \\(7, 16\\), slots 8", lambda: clear_dead(rows(7, 16), SLOTS)),
    ("a scheme goes with QuantStages", lambda: StagedPrepareFinalize(scheme=SCHEMES["fp8_token"])),
    ("no bias", lambda: grouped_gemm(rows(4, 16), rows(3, 8, 16), rows(8, 8), blocks(), 2, rows(3, 8))),
    ("bfloat16 on CUDA, not torch.float16", lambda: grouped_gemm(rows(4, 16).half(), rows(3, 8, 16), rows(8, 8), blocks(), 2)),
    ("rows have 16 columns, w 24", lambda: grouped_gemm(rows(4, 16), rows(3, 8, 24), rows(8, 8), blocks(), 2)),
    ("x is on cpu", lambda: grouped_gemm(rows(4, 16), rows(3, 8, 16), rows(8, 8), blocks(), 2)),
]


@pytest.mark.parametrize(("words", "call"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refused(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(ContractError, match=words):
        call()


class OnDevice:
    """As much of a CUDA tensor as `check_tensors` looks at. A tensor of several elements has no truth value."""

    is_cuda = True

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)

    def __bool__(self) -> bool:
        raise RuntimeError("Boolean value of Tensor with more than one value is ambiguous")


def test_tensors_of_one_device_are_accepted_and_of_two_refused() -> None:
    here, also, there = OnDevice("cuda:0"), OnDevice("cuda:0"), OnDevice("cuda:1")

    library.check_tensors(x=here, y=None, z=also)  # type: ignore[arg-type]
    with pytest.raises(ContractError, match="y is on cuda:1, another tensor on cuda:0; all must share one"):
        library.check_tensors(x=here, y=there)  # type: ignore[arg-type]
