"""Faults that only a GPU can trigger: seen by their history alone, blamed, shrunk; the neutral twin passes.

What needs no GPU is asked everywhere: that the catalogue counts them, that each layer is right call by call, and what the
allocator's free blocks are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.catalogue import CATALOGUE
from moeproof.harness.faults.gpu_report import section
from moeproof.harness.faults.on_gpu import CASE, PLANTINGS, Planting, hunt_on_gpu, shrunk_on_gpu
from moeproof.harness.judging.churn import canaries, free_blocks, trampled
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import ContractError

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="streams and graphs need an NVIDIA GPU")
every = pytest.mark.parametrize("planted", PLANTINGS, ids=lambda p: p.label.replace(" ", "-"))


def test_the_catalogue_counts_them() -> None:
    assert [(f.id, variant) for f in CATALOGUE for variant in f.on_gpu] == [(p.id, p.variant) for p in PLANTINGS]
    assert {p.history for p in PLANTINGS} == {"stream", "graph"}


def test_the_page_names_each_of_them_whether_it_was_run_or_not(tmp_path: Path) -> None:
    text = "\n".join(section(tmp_path))

    assert "Not run." in text
    assert all(f"{p.id} " in text and p.variant in text for p in PLANTINGS)


@every
@pytest.mark.parametrize("armed", [True, False], ids=["fault", "twin"])
def test_call_by_call_it_is_right(planted: Planting, armed: bool) -> None:
    thing, witness = planted.candidate(armed)
    for line in (str(CASE), "T=9,H=40,I=24,E=4,K=3,routing=minus1,history=interleave,seed=1"):
        assert judge(thing, parse_case(line), "cpu").outcome is Outcome.PASS
    assert witness.fired == 0


@every
def test_without_a_gpu_its_history_is_unsupported(planted: Planting) -> None:
    verdict = judge(planted.candidate()[0], replace(CASE, history=planted.history), "cpu")

    assert verdict.outcome is Outcome.UNSUPPORTED and "needs an NVIDIA GPU" in verdict.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_hunt_without_a_gpu_is_refused() -> None:
    with pytest.raises(ContractError, match="need an NVIDIA GPU"):
        hunt_on_gpu(PLANTINGS[0])


def _segment(stream: int, kind: str, total: int, *blocks: tuple[int, str], **other: object) -> dict[str, object]:
    listed = [{"size": size, "state": state} for size, state in blocks]
    return {"device": 0, "stream": stream, "segment_type": kind, "total_size": total, "blocks": listed} | other


def test_free_blocks_are_those_of_the_default_pool_in_pieces_that_land_in_them() -> None:
    """Requests beyond 1 MiB never land in a small segment: a free one of 2 MiB takes two."""
    mib = 1 << 20
    segments = [
        _segment(0, "small", 2 * mib, (512, "inactive"), (2 * mib - 512, "active_allocated")),
        _segment(7, "small", 2 * mib, (2 * mib, "inactive")),
        _segment(7, "large", 20 * mib, (3 * mib, "inactive"), (17 * mib - 4096, "active_allocated"), (4096, "inactive")),
        _segment(0, "small", 2 * mib, (2 * mib, "inactive"), segment_pool_id=(0, 1)),
        _segment(0, "small", 2 * mib, (2 * mib, "inactive"), device=1),
    ]

    assert free_blocks(segments, 0) == [(7, 3 * mib), (7, mib), (7, mib), (0, 512)]


@on_gpu
@every
def test_only_its_history_shows_it_and_the_twin_passes(planted: Planting) -> None:
    found = hunt_on_gpu(planted)

    assert found.triggered and found.caught and found.right_stage, found
    assert found.twin_checks == 2 and not found.twin_alarms, found.twin_alarms


@on_gpu
@pytest.mark.parametrize("planted", [p for p in PLANTINGS if p.id == "P93"], ids=lambda p: p.variant.replace(" ", "-"))
def test_it_shrinks_with_its_history(planted: Planting) -> None:
    small = shrunk_on_gpu(planted, seconds=15)

    assert small.tokens <= 4 and small.case.history == "graph", small


@on_gpu
def test_canaries_take_every_freed_block_whatever_its_stream_and_no_other_memory() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        freed = [torch.zeros(n, dtype=torch.uint8, device=device) for n in (700, 3 << 20)]
    where = [t.data_ptr() for t in freed]
    torch.cuda.synchronize()
    del freed
    reserved = torch.cuda.memory_reserved()
    held = canaries(device)

    assert torch.cuda.memory_reserved() == reserved
    assert all(any(t.data_ptr() <= at < t.data_ptr() + t.numel() for t in held) for at in where)
    assert free_blocks(torch.cuda.memory_snapshot(), device.index or 0) == []
    assert trampled(held) == 0
    held[0][3] = 0
    assert trampled(held) == 1
