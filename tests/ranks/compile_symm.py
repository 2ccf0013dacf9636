"""Compiles the launches of one rank of a one-sided exchange for sm_90, without a GPU: `compile_symm.py RANK RANKS`.

A child of test_symm_compiled.py: it prints each kernel's resources, and last how wide the stores of rows are.
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
from compile_only import Driver

from moeproof.optimized.symm import exchange
from moeproof.optimized.symm.cuts import ALONE, beside
from moeproof.optimized.symm.layout import Layout, Payload
from moeproof.optimized.symm.room import check_room
from moeproof.reference.contract import Grid

SIZES = {
    "bf16": (Payload(7168, 8, torch.bfloat16, 7168), Grid(64, 2), 128),
    "fp8": (Payload(7168, 8, torch.float8_e4m3fn, 7168, torch.float32, 56), Grid(64, 2), 128),
    "every size 1": (Payload(1, 1, torch.bfloat16, 1, torch.float32, 1), Grid(2, 2), 1),
    "eight ranks": (Payload(2048, 8, torch.float16, 2048), Grid(128, 8, tp=2), 4096),
}


def main(rank: int) -> None:
    driver.set_active(Driver())
    exchange.allocate = lambda link, nbytes: ((torch.empty(1, dtype=torch.uint8),) * link.size, None)  # type: ignore[assignment]
    exchange.agree = lambda *_: None  # type: ignore[assignment]
    Layout.view = lambda self, arena, name: torch.empty(8)  # type: ignore[method-assign]
    for case, (payload, grid, most) in SIZES.items():
        Driver.case = case
        link: Any = SimpleNamespace(rank=rank, size=grid.ranks, device=torch.device("cpu"), group=None)
        for cuts in (ALONE, beside(1 / 8), beside(1 / 8, copies=True)):
            made = exchange.Exchange(link, Layout(grid, payload, most), {}, cuts=cuts)
        check_room(made, torch.empty(grid.experts, dtype=torch.int32), 8)
    wide: dict[str, int] = {}
    for kernel in (exchange._dispatch, exchange._put_sums, exchange._add_up):
        for cache, *_ in kernel.device_caches.values():
            for compiled in cache.values():
                found = re.findall(r"st\.global\.v4\.b32", compiled.asm["ptx"])
                wide[kernel.__name__] = max(wide.get(kernel.__name__, 0), len(found))
    print(json.dumps({"wide stores": wide}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
