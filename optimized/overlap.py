"""Programmatic dependent launch (Hopper): a kernel is set up while the one before it still runs.

Every kernel of a chain waits before it touches memory, and lets the next one be set up at once: only launch latency
overlaps, never work. The first kernel of a chain is launched without it, so it also ends what came before.
"""

# Device code has no annotations: Triton gives its arguments their types at each launch.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def after_previous(OVERLAP: tl.constexpr):
    """Must stand before the first access to memory of a kernel launched with launch_pdl=OVERLAP."""
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()


def launch_options(overlap: bool, first: bool = False) -> dict[str, bool]:
    """Keyword arguments of a launch; the `first` of a chain waits for all before it, as any launch does.

    The interpreter knows no launch_pdl, so it is only named where it is wanted.
    """
    return {"OVERLAP": overlap} | ({"launch_pdl": True} if overlap and not first else {})
