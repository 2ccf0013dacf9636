"""The CUDA kernels' own source, run on the host and judged by the harness: results, guard bands, strides, planted faults."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cuda_emulator import COMPILER, emulated_candidates, emulating
from cuda_faults import FAULTS, WIDE, Fault, plant
from cuda_strides import checks

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.optimized import align as triton
from moeproof.optimized.cuda import align as cuda
from moeproof.optimized.cuda import stages, toolkit
from moeproof.optimized.cuda.library import CudaError
from moeproof.optimized.cuda.quantise import quantise
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, SCHEMES, Router
from moeproof.reference.oracle import quantise as oracle

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++ here to compile the emulated kernels")

CASES = [
    "T=9,H=50,I=50,E=40,K=4,routing=minus1,seed=1",
    "T=9,H=104,I=72,E=4,K=2,values=sat,seed=2",
    "T=9,H=40,I=24,E=7,K=3,ep=2,ep_rank=1,placement=round_robin,strided=1,routing=dup,seed=3",
    "T=9,H=40,I=24,E=6,K=3,dtype=fp32,act=swigluoai,router=softmax:bias:zero_experts=4:scale=6,seed=4",
    "T=8,H=40,I=24,E=16,K=4,dtype=fp16,act=situ:beta=4:linear_beta=25,"
    "router=sigmoid:bias:groups=4/2:top2:renorm=eps/1e-20:scale=2.5,seed=5",
    "T=7,H=32,I=16,E=8,K=1,act=gelu,weight_on_input=1,inplace=1,logits=nan,seed=6",
    "T=9,H=40,I=24,E=5,K=3,shared=24,shared_gate=1,scale_on_sum=2,act=silu:limit=1,seed=7",
    "T=5,H=24,I=16,E=6,K=2,router=sparsemixer,logits=ties,act=relu2_no_mul,seed=8",
    "T=5,H=24,I=16,E=40,K=3,router=sqrtsoftplus:renorm=lp/2:fused_shared=1,act=gelu_tanh,seed=9",
    "T=0,H=32,I=16,E=4,K=2",
    "T=9,H=40,I=24,E=5,K=2,layout=batched,capacity=18,routing=minus1,seed=10",
    "T=9,H=40,I=24,E=6,K=3,layout=batched,capacity=9,ep=2,act=swigluoai,strided=1,routing=dup,seed=11",
    "T=9,H=50,I=40,E=4,K=1,layout=batched,capacity=9,dtype=fp32,act=relu2_no_mul,weight_on_input=1,seed=12",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_token,values=hetero,routing=minus1",
    "T=9,H=160,I=96,E=5,K=2,scheme=fp8_block,values=pin,strided=1",
    "T=9,H=160,I=96,E=5,K=2,scheme=int8_token,values=hetero,dtype=fp16",
    "T=9,H=160,I=96,E=5,K=2,scheme=mxfp8_up,values=pin,dtype=fp32",
    "T=9,H=160,I=96,E=5,K=2,scheme=mxfp4_w4a4,act=swigluoai",
    "T=9,H=160,I=96,E=5,K=2,scheme=mxfp6_e3m2,act=relu2_no_mul",
    "T=9,H=50,I=50,E=5,K=2,scheme=fp8_tensor_static,act=swigluoai",
]
SAMPLE = (
    "combine.past_end",
    "act.tail_dropped",
    "align.scan_width",
    "align.minus_one_wraps",
    "rows.padding_scattered",
    "combine.int32_offset",
    "quantise.group_tail",
    "quantise.reciprocal",
)
"""Of FAULTS; the others are planted on a GPU by ci/cuda_check.py."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def on_host(folder: Path) -> Iterator[None]:
    with emulating(folder):
        yield


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("line", CASES)
def test_judged(line: str) -> None:
    case = parse_case(line)
    verdicts = [judge(candidate, case, "cpu") for candidate in emulated_candidates()]

    assert all(v.outcome in (Outcome.PASS, Outcome.UNSUPPORTED) for v in verdicts), "\n".join(map(str, verdicts))
    assert any(v.outcome is Outcome.PASS for v in verdicts)


@pytest.mark.parametrize(
    "line",
    [
        "T=9,H=1152,I=96,E=5,K=2,scheme=int8_token,routing=minus1",
        "T=5,H=1280,I=128,E=5,K=2,scheme=fp8_token,values=hetero",
        "T=9,H=384,I=256,E=5,K=2,scheme=fp8_block,values=pin",
        "T=9,H=160,I=96,E=5,K=2,scheme=mxfp8,routing=minus1",
        "T=9,H=160,I=96,E=5,K=2,scheme=mxfp4_w4a4,values=pin",
        "T=9,H=160,I=96,E=5,K=2,scheme=mxfp4_w4a4_up,values=hetero,routing=dup",
    ],
)
def test_kernels_of_many_rows(line: str, folder: Path, tmp_path: Path) -> None:
    """The quantisers that large batches take, on small ones: a copy of the source that calls no batch small."""
    for path in (*toolkit.SOURCES.glob("*.cu"), *toolkit.SOURCES.glob("*.cuh")):
        shutil.copy(path, tmp_path / path.name)
    source, few = tmp_path / "quantise.cu", "FEW = 128 * 2048;"
    assert source.read_text().count(few) == 1
    source.write_text(source.read_text().replace(few, "FEW = 0;"))
    with emulating(folder, tmp_path):
        candidate = next(c for c in emulated_candidates() if c.name == "cuda-quant-triton-gemm")
        verdict = judge(candidate, parse_case(line), "cpu")

    assert verdict.outcome is Outcome.PASS, str(verdict)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize("scheme", ["mxfp4_w4a4", "mxfp4_w4a4_up"])
def test_every_bfloat16_beside_a_group_maximum(scheme: str) -> None:
    """All significands and signs, ten binades below maxima of many, at both ends of the range: the codes of the oracle."""
    q = SCHEMES[scheme].a1
    assert q is not None
    magnitudes = torch.arange(128 * 10, dtype=torch.int32) + 128 * 118  # bits of bfloat16, from 2^-9 to just below 2
    tops = magnitudes[-128::9]
    signed = torch.cat([magnitudes, magnitudes + 0x8000]).view(-1, 20)
    x = torch.cat([torch.cat([signed, top.expand(len(signed), 12)], 1) for top in tops])
    x = torch.cat([x + 128 * binades for binades in (-116, 0, 120)])
    values = x.masked_fill((x & 0x7FFF) > x[:, -1:], 0).to(torch.uint16).view(torch.bfloat16)
    codes, scales = quantise(values, q, FORMATS["bf16"])
    wanted = oracle.quantise(values.double(), q, FORMATS["bf16"])

    assert torch.equal(codes, wanted.codes())
    assert torch.equal(scales, wanted.scale(FORMATS["bf16"]))


SORTED = ("sorted_slots", "block_expert", "num_padded", "counts")


def random_slots(T: int, K: int, E: int, seed: int) -> Slots:
    """A fifth dead, half of the experts elsewhere."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, E, (T, K), generator=g).masked_fill(torch.rand(T, K, generator=g) < 0.2, -1)
    mapping = torch.full((E,), -1, dtype=torch.int32)
    mapping[::2] = torch.arange((E + 1) // 2, dtype=torch.int32)
    return Slots(ids, E, (E + 1) // 2, mapping)


@pytest.mark.usefixtures("on_host")
@pytest.mark.parametrize(
    ("T", "K", "E", "block_m"),
    [(1, 1, 1, 16), (100, 3, 77, 16), (200, 8, 33, 32), (1025, 2, 9, 64), (900, 8, 20, 32), (1100, 8, 70, 16)],
)
def test_the_sort_is_the_triton_twins(T: int, K: int, E: int, block_m: int) -> None:
    """Bit for bit, in each of the one-launch forms and (8,800 slots) in the two-launch form."""
    slots = random_slots(T, K, E, T)
    ours, twin = cuda.align(slots, block_m), triton.align(slots, block_m)

    assert all(torch.equal(getattr(ours, name), getattr(twin, name)) for name in SORTED)
    batched = zip(cuda.batch_rows(slots, 50), triton.batch_rows(slots, 50), strict=True)
    assert all(torch.equal(a, b) for a, b in batched)


@pytest.mark.usefixtures("on_host")
def test_either_router_feeds_either_sort() -> None:
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(1))
    routed = [side.route(logits, Router.parse("softmax:renorm=sum"), 3)[0] for side in (stages.TRITON, stages.CUDA)]
    sorts = [side.align(Slots(ids, 12, 12), 16) for ids in routed for side in (stages.TRITON, stages.CUDA)]

    assert all(torch.equal(getattr(sorts[0], name), getattr(a, name)) for a in sorts for name in SORTED)


@pytest.mark.usefixtures("on_host")
def test_offsets_beyond_32_bits() -> None:
    assert {stage: agrees() for stage, agrees in checks("cpu").items()} == dict.fromkeys(checks("cpu"), True)


@pytest.mark.usefixtures("on_host")
def test_a_refused_launch_is_raised() -> None:
    """A device that is out of shared memory answers with an error code; nothing swallows it."""
    arguments = {"counts": None, "e": 0, "block_m": 1, "ends": None}
    from moeproof.optimized.cuda import library

    with pytest.raises(CudaError, match="moeproof_rows: invalid argument"):
        bad = {name: 0 for name in library.signatures(library.toolkit.SOURCES, "rows")["moeproof_rows"] if name != "stream"}
        library.call("rows", "moeproof_rows", torch.device("cpu"), **bad | {"dtype": 7})
    library.call("rows", "moeproof_ends", torch.device("cpu"), **arguments)


def caught(fault: Fault, folder: Path, sources: Path) -> bool:
    with emulating(folder, plant(fault, sources)):
        if fault.case == WIDE:
            return not checks("cpu")[fault.stage]()
        candidate = next(c for c in emulated_candidates() if c.name == fault.candidate)
        return judge(candidate, parse_case(fault.case), "cpu").outcome in (Outcome.FAIL, Outcome.FLAKY)


def test_a_fault_that_no_verdict_sees_has_a_tool() -> None:
    assert all(fault.tool for fault in FAULTS if not fault.judged)
    assert {fault.tool for fault in FAULTS} >= {"memcheck", "racecheck", "initcheck", "synccheck"}


@pytest.mark.parametrize("name", SAMPLE)
def test_planted_fault_is_caught(name: str, folder: Path, tmp_path: Path) -> None:
    fault = next(f for f in FAULTS if f.name == name)

    assert caught(fault, folder, tmp_path)


def test_every_fault_can_be_planted(tmp_path: Path) -> None:
    """Its text stands exactly once in its file, so that a changed source cannot leave a fault that changes nothing."""
    for fault in FAULTS:
        (tmp_path / fault.name).mkdir()
        plant(fault, tmp_path / fault.name)

    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
