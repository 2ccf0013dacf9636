"""The seed's interfaces in plain PyTorch: loops over experts, float32 arithmetic, one rounding per stage.

A second reading of the contract beside the oracle, which it never imports; the slow twin of every fast implementation.
"""

from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.candidates import candidates
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts
from moeproof.reference.eager.prepare_finalize import BatchedPrepareAndFinalize, NoEPPrepareAndFinalize
from moeproof.reference.eager.ranks_all_gather import AllGatherReduceScatter
from moeproof.reference.eager.ranks_all_to_all import AllToAll
from moeproof.reference.eager.ranks_batched import BatchedAllToAll
from moeproof.reference.eager.ranks_link import GroupLink, on_threads
from moeproof.reference.eager.router import route

__all__ = [
    "AllGatherReduceScatter",
    "AllToAll",
    "BatchedAllToAll",
    "BatchedLoopExperts",
    "BatchedPrepareAndFinalize",
    "GroupLink",
    "LoopExperts",
    "NoEPPrepareAndFinalize",
    "activate",
    "candidates",
    "on_threads",
    "route",
]
