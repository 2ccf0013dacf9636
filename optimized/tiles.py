"""Tile shapes of the grouped GEMMs, chosen in host code from sizes alone (no autotuning, no look at the data)."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

import torch
import triton

from moeproof.reference.contract.errors import check


@dataclass(frozen=True)
class Tile:
    """One program computes block_m x block_n of the output in steps of block_k."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int = 1
    """Row blocks that run side by side, so that they share a weight tile in L2."""
    warps: int = 4
    stages: int = 3
    tma: bool = False
    """Weights arrive by tensor descriptor (Hopper's bulk copies) instead of by a pointer for each element."""
    per_sm: int = 0
    """Persistent programs on each multiprocessor, which take turns at the tiles; 0 = a program for each tile."""
    flat: bool = False
    """One loop over tiles and steps: a persistent program loads its next tile while it writes the last one."""
    bulk: bool = False
    """GEMM1's rows leave by bulk copies too: the store runs on while the program goes to its next tile."""
    swap: bool = False
    """Weights are the left operand: 64 of their rows against a few tokens, where Hopper's products need 64 rows (fp8)."""
    fast: bool = False
    """Sums of fp8 products stay in the tensor core, 13 fraction bits, from end to end: a weaker accumulator, to be claimed."""
    roles: bool = False
    """Warps have roles (Hopper): one copies tiles, two groups of four multiply, each at its own pace."""
    apart: bool = False
    """Each step's sum is taken apart: its products go in one batch that is waited for, instead of one by one under the next
    step's decoding. Fewer instructions, less overlap (four-bit weights on the left)."""

    def __str__(self) -> str:
        """`128x256x64-g8-w8-s3-tma-p1`; `parse` reads it back."""
        words = [f"{self.block_m}x{self.block_n}x{self.block_k}", f"g{self.group_m}", f"w{self.warps}", f"s{self.stages}"]
        flags: tuple[tuple[str, object], ...] = (("tma", self.tma), (f"p{self.per_sm}", self.per_sm), ("flat", self.flat))
        flags += (("bulk", self.bulk), ("swap", self.swap), ("fast", self.fast), ("roles", self.roles))
        flags += (("apart", self.apart),)
        words += [word for word, has in flags if has]
        return "-".join(words)

    @classmethod
    def parse(cls, text: str) -> Tile:
        flags_of = r"(-tma)?(?:-p(\d+))?(-flat)?(-bulk)?(-swap)?(-fast)?(-roles)?(-apart)?"
        found = re.fullmatch(rf"(\d+)x(\d+)x(\d+)-g(\d+)-w(\d+)-s(\d+){flags_of}", text)
        check(found is not None, f"'{text}' is no tile; tiles look like {cls(128, 256, 64, 8, 8, 3, True, 1)}")
        assert found is not None
        *sizes, tma, per_sm, flat, bulk, swap, fast, roles, apart = found.groups()
        flags = {"tma": tma, "flat": flat, "bulk": bulk, "swap": swap, "fast": fast, "roles": roles, "apart": apart}
        return cls(*(int(n) for n in sizes), per_sm=int(per_sm or 0), **{name: bool(has) for name, has in flags.items()})

    @property
    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


DECODE = Tile(16, 64, 128, 1, 4, 4)
GPU_16BIT = {
    16: DECODE,
    32: Tile(32, 128, 64, 1, 4, 4),
    64: Tile(64, 128, 64, 4, 4, 4),
    128: Tile(128, 128, 64, 8, 8, 3),
}
"""By block_m. Decode is bound by weight bytes: narrow tiles fill the GPU. Prefill is bound by the tensor cores."""
GPU_FP32 = {
    16: Tile(16, 64, 32, 1, 4, 3),
    32: Tile(32, 64, 32, 1, 4, 3),
    64: Tile(64, 64, 32, 4, 4, 3),
    128: Tile(128, 64, 16, 8, 8, 3),
}
"""IEEE products run outside the tensor cores, from registers: smaller tiles."""
INTERPRETED = {m: Tile(m, 256, 256) for m in (16, 32, 64, 128)}
"""A program costs milliseconds whatever its size."""


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 3 in the interpreter, so that a persistent program has several tiles. 132 is an H100's."""
    if interpreted():
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def table(dtype: torch.dtype) -> dict[int, Tile]:
    """Tiles by block_m for operands of `dtype` here."""
    if interpreted():
        return INTERPRETED
    return GPU_FP32 if dtype == torch.float32 else GPU_16BIT


def rows_per_block(num_rows: int, num_experts: int) -> int:
    """block_m for num_rows spread over num_experts: half a block is wasted per expert, so about the mean count."""
    mean = num_rows / max(num_experts, 1)
    return next((m for m in (16, 32, 64) if mean <= 1.5 * m), 128)


def gemm_tile(block_m: int, N: int, K: int, dtype: torch.dtype) -> Tile:
    """Tile for an output of N columns and products of length K; never wider than the matrix, padded to a power of two."""
    t = table(dtype)[block_m]
    narrow = max(16, triton.next_power_of_2(N))
    short = max(16, triton.next_power_of_2(K))
    if K % 16 and not interpreted():
        # Rows that start anywhere are loaded element by element, each with its own pointer: long steps spill.
        short = min(short, 32)
    return Tile(block_m, min(t.block_n, narrow), min(t.block_k, short), t.group_m, t.warps, t.stages)
