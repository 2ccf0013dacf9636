"""What ci/cuda_check.py asks of its worker processes: functions that answer with a row of facts."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "cuda"))

import cuda_faults as faults
import cuda_strides as strides

from moeproof.harness import modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pairs import as_candidate, forward
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.optimized.cuda import stages, toolkit
from moeproof.optimized.cuda.candidates import batched_pair, candidate, candidates, quant_candidate
from moeproof.optimized.cuda.quantise import quantise as cuda_quantise
from moeproof.optimized.quant.quantise import quantise as triton_quantise
from moeproof.optimized.slots import Slots
from moeproof.reference.contract import FORMATS, SCHEMES, Activation, Candidate, Pair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.modular import FusedMoEModularKernel

Row = dict[str, object]
TRITON = "all-triton"
"""Both layers with no stage from CUDA: what completes the matrix of backends."""


def everything() -> list[Candidate]:
    """All candidates, the pairs among them too, and the layers from Triton's stages alone."""
    alone = candidate(TRITON, ()), quant_candidate(f"{TRITON}-quant", ()), batched_pair(f"{TRITON}-batched", ())
    return [as_candidate(thing) for thing in (*candidates(), *alone)]


def by_name(name: str) -> Candidate:
    return next(c for c in everything() if c.name == name)


def _facts(verdict: Verdict) -> Row:
    """A verdict as a row; its words where it is no PASS."""
    row: Row = {"candidate": verdict.candidate, "case": str(verdict.case), "outcome": str(verdict.outcome)}
    row |= {"checked": verdict.checked, "seconds": round(verdict.seconds, 2)}
    if verdict.outcome is Outcome.UNSUPPORTED:
        return row | {"words": verdict.reason}
    return row if verdict.outcome is Outcome.PASS else row | {"words": str(verdict)[:1500]}


def verify(line: str) -> Row:
    """Verdicts of every candidate that takes the case: one process does them all, so that the oracle works once."""
    modes.choose("device")
    case = parse_case(line)
    return {"case": line, "verdicts": [_facts(judge(candidate, case, "cuda")) for candidate in everything()]}


def index_width(stage: str) -> Row:
    """Does a call on far-apart rows agree with that on small tensors?"""
    return {"index_width": stage, "agrees": strides.checks("cuda")[stage]()}


def routed(line: str) -> Row:
    """Either router's ids through either sort: one alignment, bit for bit."""
    modes.choose("device")
    inputs = make_inputs(parse_case(line), "cuda")
    p = inputs.problem
    found = []
    for first in (stages.TRITON, stages.CUDA):
        ids = stages.routing(inputs, first)["topk_ids"]
        for second in (stages.TRITON, stages.CUDA):
            a = second.align(Slots(ids, p.routed_ids + p.router.fused_shared, p.routed_ids + p.router.fused_shared), 16)
            found.append((ids, a.sorted_slots, a.block_expert, a.num_padded, a.counts))
    same = all(torch.equal(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))
    return {"routed": line, "agrees": same}


COMPARED = ("fp8_token", "fp8_block", "int8_token", "mxfp8", "mxfp8_up", "mxfp4_w4a4", "mxfp4_w4a4_up", "mxfp6_e3m2")
"""Schemes whose activations either backend quantises."""


def quantised(scheme: str) -> Row:
    """Either backend's codes and scales of batches that take the kernels of many rows and of few: bit for bit."""
    q = SCHEMES[scheme].a1
    assert q is not None
    g = torch.Generator("cuda").manual_seed(1)
    same = True
    for rows, columns, act in ((16384, 2048, None), (3000, 7168, None), (20000, 1536, Activation()), (700, 1536, Activation())):
        x = (
            torch.randn(rows, columns, generator=g, device="cuda")
            * torch.exp2(torch.arange(rows, device="cuda") % 40 - 20.0)[:, None]
        )
        x, ids = x.to(torch.bfloat16), torch.randint(-1, 4, (rows // 4, 4), generator=g, device="cuda")
        live = slice(None) if act is None else ids.flatten() >= 0
        h = None if act is None else torch.zeros(rows, columns // 2, dtype=x.dtype, device="cuda")
        ours = cuda_quantise(x, q, FORMATS["bf16"], act=act, slots=Slots(ids, 4, 4) if act else None, h_RI=h)
        # The twin is given our activations: its own may differ in their last bit.
        twin = triton_quantise(x if h is None else h, q, FORMATS["bf16"])
        same &= all(torch.equal(a.view(torch.uint8)[live], b.view(torch.uint8)[live]) for a, b in zip(ours, twin, strict=True))
    return {"quantised": scheme, "agrees": same}


REPLAYED = tuple(f"T=64,H=512,I=256,E=32,K=4{more}" for more in ("", ",scheme=fp8_token", ",layout=batched,capacity=256"))


def _out_of_pair(name: str) -> Callable[[Inputs], dict[str, torch.Tensor]]:
    """The output alone: to find a batched layout's rows the harness looks at them on the host, which no graph can hold."""
    pair = next(thing for thing in candidates() if thing.name == name)
    assert isinstance(pair, Pair)
    return lambda i: {"out": forward(FusedMoEModularKernel(pair.prepare_finalize(i), pair.experts(i)), i, None)}


def history(name: str) -> Row:
    """Graph replay with changed inputs, and a side stream: bits as in a plain call."""
    modes.choose("device")
    line = next(line for line in REPLAYED if by_name(name).supports(parse_case(line).problem) is None)
    run = _out_of_pair(name) if "batched" in line else by_name(name).run
    first, second = (make_inputs(parse_case(f"{line},seed={seed}"), "cuda") for seed in (1, 2))
    wanted = [{n: t.clone() for n, t in run(given).items()} for given in (first, second)]  # type: ignore[union-attr]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = {n: t.clone() for n, t in run(first).items()}  # type: ignore[union-attr]
    stream.synchronize()
    held = first.map({n: t.clone() for n, t in first.tensors()})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        shown = run(held)
    replays = []
    for given in (second, first):
        for (_, to), (_, source) in zip(held.tensors(), given.tensors(), strict=True):
            to.copy_(source)
        graph.replay()
        torch.cuda.synchronize()
        replays.append({n: t.clone() for n, t in shown.items()})  # type: ignore[union-attr]
    compared = [n for n in wanted[0] if n not in ("sorted_slots", "block_expert")]  # their unused tails hold anything

    def equal(a: dict, b: dict) -> bool:  # type: ignore[type-arg]
        return all(torch.equal(a[n].contiguous().view(torch.uint8), b[n].contiguous().view(torch.uint8)) for n in compared)

    return {
        "history": name,
        "graph_replay": equal(replays[0], wanted[1]) and equal(replays[1], wanted[0]),
        "side_stream": equal(aside, wanted[0]),
    }


@contextlib.contextmanager
def planted(name: str) -> Iterator[faults.Fault]:
    """While active, the CUDA sources hold this fault."""
    fault = next(f for f in faults.FAULTS if f.name == name)
    with tempfile.TemporaryDirectory() as folder, patch.object(toolkit, "SOURCES", faults.plant(fault, Path(folder))):
        yield fault


def compile_fault(name: str, arch: str) -> Row:
    """Put the faulty libraries that its case calls into the cache, where `hunt` finds them; the quantiser compiles longest."""
    with planted(name) as fault:
        wanted = [stage for stage in toolkit.STAGES if stage != "quantise" or fault.stage == "quantise"]
        return {"libraries": len([toolkit.build(stage, arch) for stage in wanted])}


def hunt(name: str) -> Row:
    """Plant a fault, run its case, and say whether it was caught. It may cost this process its CUDA context."""
    modes.choose("device")
    start = time.perf_counter()
    with planted(name) as fault:
        if fault.case == faults.WIDE:
            caught, words = not strides.checks("cuda")[fault.stage](), "differs from the call on small strides"
        else:
            verdict = judge(by_name(fault.candidate), parse_case(fault.case), "cuda")
            words = verdict.findings[0].message if verdict.findings else verdict.reason
            caught = verdict.outcome in (Outcome.FAIL, Outcome.FLAKY) or "CUDA" in words
    row: Row = {"fault": name, "stands_for": fault.stands_for, "caught": caught, "words": words}
    return row | {"seconds": round(time.perf_counter() - start, 2)}
