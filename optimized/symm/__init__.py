"""Exchange between ranks by one-sided puts into symmetric memory: Triton kernels that write, signal and wait.

memory (arenas of all ranks) and layout (what lies where) -> signals (how kernels meet) -> dispatch, combine (kernels) ->
exchange (launches, failures in words) -> prepare_finalize (the seed's interfaces) -> candidates.
"""

from moeproof.optimized.symm.exchange import Exchange
from moeproof.optimized.symm.layout import Layout, Payload
from moeproof.optimized.symm.prepare_finalize import SymmBatchedPrepareFinalize, SymmStandardPrepareFinalize

__all__ = ["Exchange", "Layout", "Payload", "SymmBatchedPrepareFinalize", "SymmStandardPrepareFinalize"]
