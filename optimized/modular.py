"""The seed-style classes of this package, in one place."""

from moeproof.optimized.experts import TritonBatchedExperts, TritonExperts
from moeproof.optimized.prepare_finalize import TritonBatchedPrepareFinalize, TritonNoEPPrepareFinalize

__all__ = ["TritonBatchedExperts", "TritonBatchedPrepareFinalize", "TritonExperts", "TritonNoEPPrepareFinalize"]
