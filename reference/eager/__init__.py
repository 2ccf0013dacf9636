"""The seed's interfaces in plain PyTorch: loops over experts, float32 arithmetic, one rounding per stage.

A second reading of the contract beside the oracle, which it never imports; the slow twin of every fast implementation.
"""

from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.candidates import candidates
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts
from moeproof.reference.eager.prepare_finalize import BatchedPrepareAndFinalize, NoEPPrepareAndFinalize
from moeproof.reference.eager.router import route

__all__ = [
    "BatchedLoopExperts",
    "BatchedPrepareAndFinalize",
    "LoopExperts",
    "NoEPPrepareAndFinalize",
    "activate",
    "candidates",
    "route",
]
