"""A rank of the tests' gloo pool: started once, then one job after another. Runs in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moeproof.harness.case import parse_case
from moeproof.harness.rank_pairs import run_rank
from moeproof.harness.registry import find_rank_pairs
from moeproof.harness.worlds import make_rank_inputs
from moeproof.reference.eager.ranks_link import GroupLink

Packed = dict[str, tuple[str, tuple[int, ...], bytes]]


def packed(shown: dict[str, torch.Tensor]) -> Packed:
    """Tensors as plain bytes: nothing is shared between processes."""
    out = {}
    for name, t in shown.items():
        flat = t.clone(memory_format=torch.contiguous_format)
        out[name] = (str(t.dtype).removeprefix("torch."), tuple(t.shape), bytes(flat.reshape(-1).view(torch.uint8).numpy()))
    return out


def unpacked(shown: Packed) -> dict[str, torch.Tensor]:
    out = {}
    for name, (dtype, shape, data) in shown.items():
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        out[name] = flat.view(getattr(torch, dtype)).view(shape)
    return out


def pair_on_cases(link: GroupLink, pair: str, lines: Sequence[str]) -> list[Packed]:
    """The forward calls of `lines` in turn on one instance of an installed pair."""
    cases = [parse_case(line) for line in lines]
    chosen = next(p for p in find_rank_pairs() if p.name == pair)
    calls = [make_rank_inputs(case, link.rank) for case in cases]
    return [packed(shown) for shown in run_rank(chosen, calls, cases[0].world, link)]


def serve(rank: int, size: int, store: str, pipe: Connection) -> None:
    """Jobs are (function, number of ranks, arguments); the first ranks run it on a group of their own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=10))
    groups = [dist.new_group(list(range(count + 1)), timeout=timedelta(seconds=10)) for count in range(size)]
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        function, count, arguments = job
        pipe.send(_answer(function, groups[count - 1], arguments))
    dist.barrier()
    dist.destroy_process_group()


def _answer(function: Any, group: dist.ProcessGroup, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    try:
        return "ok", function(GroupLink(group), *arguments)
    except Exception as error:  # the parent decides what it means
        return type(error).__name__, str(error)
