"""Compiles the launches of one rank of a one-sided exchange for sm_90, without a GPU: `compile_symm.py RANK RANKS`.

A child of test_symm_compiled.py: it prints each kernel's resources, and last how wide the stores of rows are and what held
launches pass.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime import driver

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "optimized"))
import compile_only

from moeproof.optimized.symm import exchange
from moeproof.optimized.symm.cuts import ALONE, beside
from moeproof.optimized.symm.launch import Launcher
from moeproof.optimized.symm.layout import Layout, Payload
from moeproof.optimized.symm.prepare_finalize import SymmBatchedPrepareFinalize, SymmStandardPrepareFinalize
from moeproof.reference.contract import Grid

SIZES = {
    "bf16": (Payload(7168, 8, torch.bfloat16, 7168), Grid(64, 2), 128),
    "fp8": (Payload(7168, 8, torch.float8_e4m3fn, 7168, torch.float32, 56), Grid(64, 2), 128),
    "every size 1": (Payload(1, 1, torch.bfloat16, 1, torch.float32, 1), Grid(2, 2), 1),
    "eight ranks": (Payload(2048, 8, torch.float16, 2048), Grid(128, 8, tp=2), 4096),
}
LAUNCHES: list[tuple[Any, ...]] = []
"""What Triton's launcher was given, launch by launch."""


class Driver(compile_only.Driver):
    launcher_cls = staticmethod(lambda source, metadata: lambda *args: LAUNCHES.append(args))


def passed(launch: tuple[Any, ...]) -> list[object]:
    """The grid and the kernel's arguments, pointers as numbers."""

    def plain(value: Any) -> object:
        if isinstance(value, tuple):
            return tuple(map(plain, value))
        return value.data_ptr() if isinstance(value, torch.Tensor) else value

    return [*launch[:3], *map(plain, launch[9:])]


def held_as_found(launcher: Launcher, calls: list[tuple[tuple[Any, ...], tuple[int, ...]]]) -> bool:
    """Whether each call passes the second time, held, what it passed when Triton looked the kernel up, to the same kernel."""
    first = []
    for call in calls:
        launcher((3, 1, 1), *call)
        first.append(passed(LAUNCHES[-1]))
    assert len(launcher._compiled) > 1, "the calls are alike"
    for call, want in zip(calls, first, strict=True):
        found = launcher._kernel[(3, 1, 1)](*launcher._fixed, *call[0], *call[1], **launcher._options)
        count = len(LAUNCHES)
        kernels = [kernel for kernel in launcher._compiled.values() if kernel is found]
        launcher((3, 1, 1), *call)
        if len(LAUNCHES) != count + 1 or passed(LAUNCHES[-1]) != want or not kernels:
            return False
    return True


def varied() -> list[tuple[tuple[Any, ...], tuple[int, ...]]]:
    """Arguments of a dispatch that Triton has kernels of their own for, some twice."""
    flat, ids = torch.empty(200_000, dtype=torch.int32), torch.zeros(4096, dtype=torch.int64)
    calls = []
    for first, dtype, stride, tokens in ((0, torch.int32, 3584, 7), (1, torch.int32, 3584, 9), (0, torch.int64, 3585, 1)):
        for limit in (1, 2**33):
            names = ids.view(dtype)[first:]
            tensors = (flat[first:], None, names, flat.view(torch.float32))
            calls.append((tensors, (stride, 0, 8, 1, 8, 1, tokens, 0, limit, 0)))
    return calls


def main(rank: int) -> None:
    driver.set_active(Driver())
    exchange.allocate = lambda link, nbytes: ((torch.empty(1, dtype=torch.uint8),) * link.size, None)  # type: ignore[assignment]
    exchange.agree = lambda *_: None  # type: ignore[assignment]
    Layout.view = lambda self, arena, name: torch.empty(self.fields[name][1], dtype=self.fields[name][2])  # type: ignore[method-assign]
    for case, (payload, grid, most) in SIZES.items():
        compile_only.Driver.case = case
        link: Any = SimpleNamespace(rank=rank, size=grid.ranks, device=torch.device("cpu"), group=None)
        for cuts in (ALONE, beside(1 / 8), beside(1 / 8, copied_rows=True, copied_sums=True)):
            made = SymmStandardPrepareFinalize(link, grid, most, payload, cuts=cuts)
        SymmBatchedPrepareFinalize(link, grid, 64, most, payload)
    held = held_as_found(made.exchange._launch_dispatch, varied())
    wide: dict[str, int] = {}
    for kernel in (exchange._dispatch, exchange._put_sums, exchange._add_up):
        for cache, *_ in kernel.device_caches.values():
            for compiled in cache.values():
                found = re.findall(r"st\.global\.v4\.b32", compiled.asm["ptx"])
                wide[kernel.__name__] = max(wide.get(kernel.__name__, 0), len(found))
    print(json.dumps({"wide stores": wide, "held launches are as found": held}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
