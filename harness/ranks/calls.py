"""What one rank does in a judgement: every call of harness.ranks.turns, on poisoned memory between guard bands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moeproof.harness.judging.graphs import WARM_UP, load
from moeproof.harness.judging.memory import PATTERNS, Poison, dirty, fill, guard_inputs
from moeproof.harness.judging.run import damage
from moeproof.harness.ranks.pairs import RankLayer
from moeproof.harness.ranks.turns import Turn, turn_inputs
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.world import World

Tensor = torch.Tensor


@dataclass(frozen=True)
class Called:
    """What one rank showed in one call (ranks.pairs.SHOWN), on the CPU, and what was wrong around it."""

    shown: Mapping[str, Tensor]
    findings: tuple[Finding, ...] = ()


class Instance:
    """One instance of a pair, whose every allocation is poisoned and guarded for as long as it lives."""

    def __init__(self, pair: RankPair, world: World, link: Link) -> None:
        self.pair, self.world, self.link = pair, world, link
        self.poison = Poison("nan")
        self._layer: RankLayer | None = None

    def call(self, inputs: Inputs, pattern: str) -> Called:
        """A call on guarded copies of `inputs`. Raises what the candidate raises: the other ranks wait for this one."""
        given, guards = guard_inputs(inputs, pattern)
        dirty(given.device)
        self.poison.pattern = pattern
        with self.poison:
            if self._layer is None:
                self._layer = RankLayer(self.pair, given, self.world, self.link)
            shown = self._layer(given)
            self._layer.settle()
        if given.device.type == "cuda":
            torch.cuda.synchronize(given.device)
        found = damage(given, {"out": shown["out"]}, guards, self.poison)
        return Called(on_cpu(shown), tuple(replace(f, rank=self.link.rank) for f in found))


def on_cpu(shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in shown.items()}


def make_calls(pair: RankPair, late: RankPair, plan: Sequence[Turn], link: Link, device: torch.device) -> list[Called]:
    """This rank's part of every call. `late` is the same pair, behind the others in each of its parts."""
    instances: dict[int, Instance] = {}
    calls = []
    for turn in plan:
        inputs = turn_inputs(turn, link.rank, device)
        if turn.instance not in instances:
            instances[turn.instance] = Instance(late if turn.late == link.rank else pair, turn.world, link)
        calls.append(instances[turn.instance].call(inputs, turn.pattern))
    return calls


def replay(pair: RankPair, plan: Sequence[Turn], link: Link, device: torch.device) -> list[Called] | str:
    """The first call captured, and replayed with the contents of every call of `plan` in the same tensors.

    On a GPU a CUDA graph; on the CPU the call is made again, on the same instance and the same tensors. A string where it
    cannot be captured: that is a limit, not a fault.
    """
    static, _ = guard_inputs(turn_inputs(plan[0], link.rank, device), PATTERNS[0])
    layer = RankLayer(pair, static, plan[0].world, link)
    try:
        again = captured(lambda: layer(static), device)
    except RuntimeError as error:
        torch.cuda.synchronize(device)
        return str(error).strip().split("\n")[0]
    calls: list[Called] = []
    for number, turn in enumerate(plan):
        load(static, turn_inputs(turn, link.rank, device))
        dirty(device)
        calls.append(Called(on_cpu(again(PATTERNS[number % len(PATTERNS)]))))
        layer.settle()
    return calls


def captured(call: Callable[[], Mapping[str, Tensor]], device: torch.device) -> Callable[[str], Mapping[str, Tensor]]:
    """A function that repeats `call` and returns what it shows; results hold the given pattern until they are written."""
    if device.type == "cpu":
        return lambda pattern: call()
    side = torch.cuda.Stream(device=device)
    side.wait_stream(torch.cuda.current_stream(device))  # the inputs are written there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.synchronize(device)
    # Threads of the process group look at their events meanwhile: only this thread's calls must be capturable.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        shown = call()

    def again(pattern: str) -> Mapping[str, Tensor]:
        for t in shown.values():
            if t.is_contiguous():
                fill(t, pattern)  # a replay that writes nothing must not look right
        graph.replay()
        torch.cuda.synchronize(device)
        return shown

    return again
