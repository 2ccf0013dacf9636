"""Process ranks: a function on every rank of a small world, under a watchdog that always ends in a diagnosis.

    with RankPool(2, "gloo") as pool:
        run = pool.run(function, *arguments)      # function(context, *arguments) on every rank

The pool starts once and serves any number of cases. A rank that hangs, dies, raises or calls other collectives than the
rest ends in a RankRun that names it; the pool is then thrown away and the next case gets a new one.
"""

from moeproof.harness.ranks.context import RankContext
from moeproof.harness.ranks.journal import Entry, announce, enter_stage
from moeproof.harness.ranks.outcome import Ending, RankRun, RankState
from moeproof.harness.ranks.pool import RankPool
from moeproof.harness.ranks.transport import TRANSPORTS
from moeproof.reference.contract.world import rank_seed

__all__ = [
    "TRANSPORTS",
    "Ending",
    "Entry",
    "RankContext",
    "RankPool",
    "RankRun",
    "RankState",
    "announce",
    "enter_stage",
    "rank_seed",
]
