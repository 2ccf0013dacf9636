"""Whether every expert's rows fit its region: found on the device, since only the counts know."""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from moeproof.optimized.symm.signals import FAILED, FINE, FULL, tell


@triton.jit
def kept_within(total, max_rows, own, state, notice, at_notices, me, EXPERTS: tl.constexpr):
    """(EXPERTS,): rows of each local expert, capped. Fails this call, and its combine on all ranks, where one has more."""
    e = tl.arange(0, EXPERTS)
    first = tl.min(tl.where(total > max_rows, e, EXPERTS), 0)
    if (first < EXPERTS) & (tl.load(state + FAILED) == FINE):
        tell(own, state, notice, at_notices, me, FULL, first, tl.sum(tl.where(e == first, total, 0), 0))
    # Whoever reads the counts of a failed call must still stay inside the regions.
    return tl.minimum(total, max_rows)
