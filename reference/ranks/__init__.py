"""Simulated ranks: what every rank of a world holds, sends, receives, computes and ends with. Pure functions, no processes."""

from moeproof.reference.ranks.alone import alone
from moeproof.reference.ranks.combine import combine_shards, home_inputs, quantised_outputs, rank_outputs
from moeproof.reference.ranks.dispatch import (
    Arrived,
    Pair,
    Regions,
    arrived,
    batched,
    pair_counts,
    pair_rows,
    received,
    routed,
    sent_tokens,
    stored_rows,
)
from moeproof.reference.ranks.expect import RankExpectation, rank_expectations
from moeproof.reference.ranks.quant1 import arriving
from moeproof.reference.ranks.split import rank_inputs

__all__ = [
    "Arrived",
    "Pair",
    "RankExpectation",
    "Regions",
    "alone",
    "arrived",
    "arriving",
    "batched",
    "combine_shards",
    "home_inputs",
    "pair_counts",
    "pair_rows",
    "quantised_outputs",
    "rank_expectations",
    "rank_inputs",
    "rank_outputs",
    "received",
    "routed",
    "sent_tokens",
    "stored_rows",
]
