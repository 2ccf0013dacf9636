"""Simulated ranks: what every rank of a world holds, sends, receives, computes and ends with. Pure functions, no processes."""

from moeproof.reference.ranks.split import rank_inputs

__all__ = ["rank_inputs"]
