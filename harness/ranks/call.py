"""What runs on each rank when a candidate is judged: settle once, then one call per case."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks.calls import Called, make_calls, replay
from moeproof.harness.ranks.context import RankContext
from moeproof.harness.ranks.journal import enter_stage
from moeproof.harness.ranks.pairs import run_rank
from moeproof.harness.ranks.turns import replays as replay_turns
from moeproof.harness.ranks.turns import turns
from moeproof.harness.registry import load_rank_pairs
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import rank_seed
from moeproof.reference.eager.ranks_link import GroupLink

STAGES = {"prepare": str(Stage.DISPATCH), "apply": f"{Stage.PERMUTE}..{Stage.GEMM2}", "finalize": str(Stage.COMBINE)}
"""What the watchdog calls the time inside each method of the seed's interfaces."""
LATEST = 4e-3
"""Seconds that a late rank waits before each of its parts, at most; how long follows from its own seed."""


class Staged:
    """Forwards everything to the real object, and writes down which stage begins, after `pause` seconds."""

    def __init__(self, inner: object, pause: float = 0.0) -> None:
        self._inner, self._pause = inner, pause

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in STAGES:
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            enter_stage(STAGES[name])
            time.sleep(self._pause)
            return value(*arguments, **options)

        return call


def staged(pair: RankPair, pause: float = 0.0) -> RankPair:
    """The same pair, whose parts say what they are doing."""
    prepare_finalize: Any = lambda i, world, link: Staged(pair.prepare_finalize(i, world, link), pause)  # noqa: E731
    experts: Any = lambda inputs: Staged(pair.experts(inputs), pause)  # noqa: E731
    taps: Any = None if pair.taps is None else lambda made: pair.taps(made._inner)
    return replace(pair, prepare_finalize=prepare_finalize, experts=experts, taps=taps)


def show(pair: RankPair, line: str, link: Link, device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's part of the case in one call: the tensors it shows, on the CPU. Raises what the candidate raises."""
    case = parse_case(line)
    enter_stage("inputs")
    inputs = make_rank_inputs(case, link.rank, device)
    (shown,) = run_rank(staged(pair), [inputs], case.world, link)
    enter_stage("")
    return {name: t.cpu() for name, t in shown.items()}


@dataclass(frozen=True)
class Answer:
    """One rank's part of all calls of a case (harness.ranks.turns)."""

    calls: list[Called]
    replays: list[Called] | str = ""
    """With history=graph: each replay, or why the call cannot be captured."""


def answer(pair: RankPair, line: str, link: Link, device: torch.device, lean: bool = False) -> Answer:
    """Every call by which the case is judged; a lean judge asks for the first only. Raises what the candidate raises."""
    case = parse_case(line)
    pause = LATEST * (1 + rank_seed(case.seed, link.rank) % 8) / 8
    enter_stage("inputs")
    calls = make_calls(staged(pair), staged(pair, pause), turns(case, lean), link, device)
    replays: list[Called] | str = ""
    if case.history == "graph" and not lean:
        replays = replay(staged(pair), replay_turns(case), link, device)
    enter_stage("")
    return Answer(calls, replays)


def settle(context: RankContext, name: str | None) -> None:
    """Choose how this rank's kernels run, and import the candidate of this name."""
    modes.choose("interpret" if context.device.type == "cpu" else "device")
    if name is not None:
        installed(name)


def call(context: RankContext, candidate: str | RankPair, line: str) -> dict[str, torch.Tensor]:
    """One call of a case on this rank. `candidate` by name, or itself where it can travel."""
    pair = installed(candidate) if isinstance(candidate, str) else candidate
    return show(pair, line, GroupLink(context.group, context.device), context.device)


def judged_calls(context: RankContext, candidate: str | RankPair, line: str, lean: bool = False) -> Answer:
    """All calls of a case on this rank."""
    pair = installed(candidate) if isinstance(candidate, str) else candidate
    return answer(pair, line, GroupLink(context.group, context.device), context.device, lean)


@functools.lru_cache(maxsize=256)
def installed(name: str) -> RankPair:
    return load_rank_pairs([name])[0]
