"""The session's pools over gloo, and what their ranks run: functions of a link, as simulated ranks run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks import RankContext, RankPool
from moeproof.harness.ranks.call import installed
from moeproof.harness.ranks.pairs import run_rank
from moeproof.reference.contract import Link
from moeproof.reference.eager.ranks_link import GroupLink

DEADLINE = 30.0


class GlooRanks:
    """results(function, ranks, *arguments) -> what function(link, *arguments) returned on each rank.

    With `record` the collectives of the ranks must match as well.
    """

    def __init__(self, record: bool = True) -> None:
        self.record = record
        self._pools: dict[int, RankPool] = {}

    def results(self, function: Callable[..., Any], ranks: int, *arguments: Any) -> list[Any]:
        if ranks not in self._pools:
            self._pools[ranks] = RankPool(ranks, deadline=DEADLINE, record=self.record)
        run = self._pools[ranks].run(with_link, function, *arguments)
        assert run.ok, run
        return list(run.results)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()


def with_link(context: RankContext, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(GroupLink(context.group, context.device), *arguments)


def pair_on_cases(link: Link, pair: str, lines: Sequence[str]) -> list[dict[str, torch.Tensor]]:
    """The forward calls of `lines` in turn on one instance of an installed pair: what each showed."""
    cases = [parse_case(line) for line in lines]
    calls = [make_rank_inputs(case, link.rank) for case in cases]
    return run_rank(installed(pair), calls, cases[0].world, link)
