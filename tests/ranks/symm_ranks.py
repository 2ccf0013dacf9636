"""The one-sided pairs as CPU processes run them: interpreted kernels, arenas in files that the ranks share.

Experts are the plain loops: what is tested here is what lies between ranks.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from unittest import mock

from moeproof.optimized.symm import arrange
from moeproof.optimized.symm.candidates import overlapped, rank_pairs
from moeproof.optimized.symm.cuts import beside
from moeproof.reference.contract import FusedMoEPrepareAndFinalize, Inputs, Link, World
from moeproof.reference.eager.experts_of import batched_experts, standard_experts, taps

INSTALLED = {pair.name: pair for pair in rank_pairs()}
INSTALLED["by copies"] = replace(
    INSTALLED["symm-standard-overlapped"],
    name="by copies",
    prepare_finalize=partial(overlapped, cuts=beside(1 / 8, copied_rows=True, copied_sums=True)),
)


def _many(inputs: Inputs, world: World, link: Link) -> FusedMoEPrepareAndFinalize:
    with mock.patch.object(arrange, "FEW", 0):
        return BATCHED.prepare_finalize(inputs, world, link)


BATCHED = INSTALLED["symm-batched"]
INSTALLED["many slots"] = replace(BATCHED, name="many slots", prepare_finalize=_many)
PAIRS = {
    name: replace(
        pair,
        experts=batched_experts if pair.layout == "batched" else standard_experts,
        taps=taps if pair.taps else None,
        transports=("gloo",),
    )
    for name, pair in INSTALLED.items()
}
