"""Random cases on several ranks: those of sample and of quant_sample, spread over ranks, shards and replicas."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.quant_sample import draw_quantised
from moeproof.harness.cases.sample import draw
from moeproof.harness.cases.spread import SPREADS
from moeproof.reference.contract.errors import ContractError

RANKS = (2, 2, 3, 3, 4, 4, 5, 8, 16, 64)
SHARDS = (1, 1, 1, 2, 4)
REPLICAS = (0, 0, 0, 1, 3, 7)


def draw_world(seed: int, ranks: int = 0) -> Case:
    """The random world of this seed; `ranks` fixes their number. What excludes each other is drawn again.

    Odd seeds are of quantised schemes.
    """
    s = Stream(seed, "world sample")
    offset = 0
    while True:
        # A seed whose problem has too few experts for its ranks goes on to the problem of another seed.
        one = draw_quantised if seed % 2 else draw
        base = one(seed + (offset << 32)).with_problem(ep=1, ep_rank=0)
        offset += 1

        def pick(options: tuple[int, ...], s: Stream = s) -> int:
            return options[int(s.integers(0, len(options), 1))]

        number, tp, redundant, spread = pick(RANKS), pick(SHARDS), pick(REPLICAS), pick(tuple(range(len(SPREADS))))
        sp = pick((0, 1)) if tp > 1 else 0
        try:
            return replace(
                base,
                ranks=ranks or number,
                tp=tp,
                sp=sp,
                redundant=redundant,
                spread=list(SPREADS)[spread],
                relation="none",
                seed=seed,
            )
        except ContractError:
            continue


def world_sample(count: int, start: int = 0, ranks: int = 0) -> Iterator[Case]:
    """`count` random worlds, of the seeds from `start` on."""
    for seed in range(start, start + count):
        yield draw_world(seed, ranks)
