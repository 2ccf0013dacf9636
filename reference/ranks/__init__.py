"""Simulated ranks: what every rank of a world holds, sends, receives, computes and ends with. Pure functions, no processes."""

from moeproof.reference.ranks.combine import combine_shards, home_inputs, rank_outputs
from moeproof.reference.ranks.dispatch import Arrived, Pair, arrived, batched, pair_counts, received, routed, sent_tokens
from moeproof.reference.ranks.expect import RankExpectation, rank_expectations
from moeproof.reference.ranks.split import rank_inputs

__all__ = [
    "Arrived",
    "Pair",
    "RankExpectation",
    "arrived",
    "batched",
    "combine_shards",
    "home_inputs",
    "pair_counts",
    "rank_expectations",
    "rank_inputs",
    "rank_outputs",
    "received",
    "routed",
    "sent_tokens",
]
