"""The one-sided pairs as CPU processes run them: interpreted kernels, arenas in files that the ranks share.

Experts are the plain loops: what is tested here is what lies between ranks.
"""

from __future__ import annotations

from dataclasses import replace

from moeproof.optimized.symm.candidates import rank_pairs
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.eager.experts import BatchedLoopExperts, LoopExperts


def loop(inputs: Inputs) -> LoopExperts:
    return LoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


def batched_loop(inputs: Inputs) -> BatchedLoopExperts:
    return BatchedLoopExperts(inputs.problem.act, inputs.b1, inputs.b2)


INSTALLED = {pair.name: pair for pair in rank_pairs()}
PAIRS = {
    name: replace(pair, experts=batched_loop if pair.layout == "batched" else loop, transports=("gloo",))
    for name, pair in INSTALLED.items()
}
