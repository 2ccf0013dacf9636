"""How launches are cut: for a GPU that has nothing else to do, and for one that computes meanwhile."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Cut:
    """Persistent programs, what each holds at once, and the warps that share it."""

    per_sm: float
    """Programs of a multiprocessor."""
    rows: int
    block: int
    """Words or columns of a row."""
    warps: int
    """At most."""

    def shape(self, columns: int, each: int) -> dict[str, int]:
        """Options of a launch over rows of so many columns. A thread has at least `each` of them."""
        block = min(triton.next_power_of_2(max(columns, 1)), self.block)
        warps = max(min(self.warps, self.rows * block // (32 * each)), 1)
        return {"ROWS": self.rows, "BLOCK": block, "num_warps": warps}

    def programs(self, processors: int) -> int:
        return max(int(self.per_sm * processors), 1)


@dataclass(frozen=True)
class Cuts:
    """Of the three launches of a call."""

    put: Cut = Cut(2, 1, 4096, 8)
    """On an H100 rows left at 344 GB/s with one, two or four programs of a multiprocessor."""
    sums: Cut = Cut(4, 1, 1024, 4)
    """300 GB/s with two, 347 with four."""
    add: Cut = Cut(8, 1, 1024, 4)
    copied_rows: bool = False
    """The GPU's copy engines carry the rows: all of them to every rank, whether it needs them or not."""
    copied_sums: bool = False
    """They carry the sums that leave: whole regions."""


ALONE = Cuts()


def beside(share: float, copied_rows: bool = False, copied_sums: bool = False) -> Cuts:
    """Cuts that leave all but this share of the multiprocessors to others: each program has as much on its way as several."""
    put = Cut(share, 16, 64, 4) if copied_rows else Cut(share, 4, 4096, 32)
    return Cuts(put, Cut(share, 1, 8192, 32), Cut(share, 2, 8192, 32), copied_rows, copied_sums)
