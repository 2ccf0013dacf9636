"""RankPairs for tests of the command and the plugin: the all-gather pair, whole and with one fault of rank 1 each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.world import World
from moeproof.reference.eager.experts import LoopExperts
from moeproof.reference.eager.ranks_all_gather import AllGatherReduceScatter

GUILTY = 1


class Faulty(AllGatherReduceScatter):
    """Before its combine, rank 1 does what is wrong with it."""

    def finalize(self, output: Any, expert_output: Any, *arguments: Any) -> None:
        if self.link.rank == GUILTY:
            expert_output = self.fault(expert_output)
        super().finalize(output, expert_output, *arguments)

    def fault(self, expert_output: Any) -> Any:
        raise NotImplementedError


class Halves(Faulty):
    def fault(self, expert_output: Any) -> Any:
        return expert_output / 2


class Sleeps(Faulty):
    def fault(self, expert_output: Any) -> Any:
        time.sleep(3600)


class Dies(Faulty):
    def fault(self, expert_output: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Faulty):
    def fault(self, expert_output: Any) -> Any:
        raise OverflowError("no room for a third replica")


class FarRows(AllGatherReduceScatter):
    """On wide rows, which no small case has, rank 1 gets them in another order."""

    def prepare(self, a1: Any, *arguments: Any) -> Any:
        rows, *rest = super().prepare(a1, *arguments)
        return (rows.roll(1, 0) if self.link.rank == GUILTY and a1.size(1) > 64 else rows, *rest)


class FarOut(AllGatherReduceScatter):
    """On wide rows rank 1 loses the last column of its output."""

    def finalize(self, output: Any, *arguments: Any) -> None:
        super().finalize(output, *arguments)
        if self.link.rank == GUILTY and output.size(1) > 64:
            output[:, -1] = 0


def build(kind: type[AllGatherReduceScatter]) -> Callable[[Inputs, World, Link], AllGatherReduceScatter]:
    return lambda inputs, world, link: kind(link, world.grid)


def loop_experts(inputs: Inputs) -> LoopExperts:
    return LoopExperts(inputs.problem.act)


def all_gather(inputs: Inputs, world: World, link: Link) -> AllGatherReduceScatter:
    return AllGatherReduceScatter(link, world.grid)


def half_on_one(inputs: Inputs, world: World, link: Link) -> Halves:
    return Halves(link, world.grid)


def signs_in(inputs: Inputs, world: World, link: Link) -> AllGatherReduceScatter:
    """The right pair, which writes down where it was made."""
    with Path(os.environ["MOEPROOF_TEST_PIDS"]).open("a") as pids:
        pids.write(f"{os.getpid()}\n")
    return AllGatherReduceScatter(link, world.grid)


whole = RankPair("whole", all_gather, loop_experts)
travels = RankPair("travels", half_on_one, loop_experts)
"""Both are made of functions that can be sent to a rank; the others are made of closures."""
visitor = RankPair("visitor", signs_in, loop_experts)
halves, sleeps, dies, raises = (
    replace(whole, name=kind.__name__.lower(), prepare_finalize=build(kind)) for kind in (Halves, Sleeps, Dies, Raises)
)
far_rows = replace(whole, name="far_rows", prepare_finalize=build(FarRows))
far_out = replace(whole, name="far_out", prepare_finalize=build(FarOut))
