"""Whether every expert's rows fit its region: found on the device, since only the counts know."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moeproof.optimized.symm.exchange import Exchange
from moeproof.optimized.symm.signals import FAILED, FINE, FULL, tell


@triton.jit(do_not_specialize=("me",))
def _check_room(own, counts, state, notice, at_notices, num_local, max_rows, me, EXPERTS: tl.constexpr):
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < num_local, other=0)
    # Whoever reads the counts of a failed call must still stay inside the regions.
    tl.store(counts + e, tl.minimum(count, max_rows), mask=e < num_local)
    first = tl.min(tl.where(count > max_rows, e, EXPERTS), 0)
    if (first < EXPERTS) & (tl.load(state + FAILED) == FINE):
        rows = tl.sum(tl.where(e == first, count, 0), 0)
        tell(own, state, notice, at_notices, me, FULL, first, rows)


def check_room(exchange: Exchange, counts: torch.Tensor, max_rows: int) -> None:
    """Fail this call, here and with its combine on all ranks, where an expert has more rows than `max_rows`; cap the counts."""
    e = counts.numel()
    _check_room[(1,)](
        exchange.own, counts, exchange.state, exchange.notice, exchange.layout.offset("notices"), e, max_rows,
        exchange.link.rank, EXPERTS=triton.next_power_of_2(e), num_warps=1,
    )  # fmt: skip
