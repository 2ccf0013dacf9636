"""What runs on each rank when a candidate is judged: settle once, then one call per case."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch

from moeproof.harness import modes
from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.worlds import make_rank_inputs
from moeproof.harness.ranks.context import RankContext
from moeproof.harness.ranks.journal import enter_stage
from moeproof.harness.ranks.pairs import run_rank
from moeproof.harness.registry import load_rank_pairs
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.stages import Stage
from moeproof.reference.eager.ranks_link import GroupLink

STAGES = {"prepare": str(Stage.DISPATCH), "apply": f"{Stage.PERMUTE}..{Stage.GEMM2}", "finalize": str(Stage.COMBINE)}
"""What the watchdog calls the time inside each method of the seed's interfaces."""


class Staged:
    """Forwards everything to the real object, and writes down which stage begins."""

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if name not in STAGES:
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            enter_stage(STAGES[name])
            return value(*arguments, **options)

        return call


def staged(pair: RankPair) -> RankPair:
    """The same pair, whose parts say what they are doing."""
    prepare_finalize: Any = lambda inputs, world, link: Staged(pair.prepare_finalize(inputs, world, link))  # noqa: E731
    experts: Any = lambda inputs: Staged(pair.experts(inputs))  # noqa: E731
    taps: Any = None if pair.taps is None else lambda made: pair.taps(made._inner)
    return replace(pair, prepare_finalize=prepare_finalize, experts=experts, taps=taps)


def show(pair: RankPair, line: str, link: Link, device: torch.device) -> dict[str, torch.Tensor]:
    """This rank's part of the case: the tensors it shows, on the CPU. Raises what the candidate raises."""
    case = parse_case(line)
    enter_stage("inputs")
    inputs = make_rank_inputs(case, link.rank, device)
    (shown,) = run_rank(staged(pair), [inputs], case.world, link)
    enter_stage("")
    return {name: t.cpu() for name, t in shown.items()}


def settle(context: RankContext, name: str | None) -> None:
    """Choose how this rank's kernels run, and import the candidate of this name."""
    modes.choose("interpret" if context.device.type == "cpu" else "device")
    if name is not None:
        installed(name)


def call(context: RankContext, candidate: str | RankPair, line: str) -> dict[str, torch.Tensor]:
    """One case on this rank. `candidate` by name, or itself where it can travel."""
    pair = installed(candidate) if isinstance(candidate, str) else candidate
    return show(pair, line, GroupLink(context.group, context.device), context.device)


@functools.lru_cache(maxsize=256)
def installed(name: str) -> RankPair:
    return load_rank_pairs([name])[0]
