"""One rank's part of a call: a RankPair run through FusedMoEModularKernel, with taps on what passes between its parts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeproof.harness.judging.pairs import Tap, forward
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.world import World

Tensor = torch.Tensor
SHOWN = {
    "rows": "what prepare returned for the experts: (n, H), or (e, C, H) in the batched layout",
    "row_scales": "their scales, where x is quantised: (n, G) or (e, C, G), one for all rows (1, 1) or (e, 1, 1)",
    "row_ids": "(n, K): the ids that go with the rows, where prepare returned them",
    "row_weights": "(n, K): their weights",
    "expert_num_tokens": "int32 (e,)",
    "h": "what the activation gave, (n, K, I) or (e, C, I): where the candidate's taps keep it",
    "hq": "its codes, where h is quantised",
    "hs": "their scales, (1, 1, 1) where one serves all",
    "y": "what the experts returned for the rows: (n, K, H) or (e, C, H); absent where nothing arrived",
    "out": "(T, H) of this rank's own tokens",
}
"""Tensors that one rank shows, by name."""
PREPARED = ("rows", "row_scales", "expert_num_tokens", "row_ids", "row_weights")
"""What prepare returns, in its order."""


def support(pair: RankPair, world: World, transport: str) -> str | None:
    """None, or why this pair cannot run in this world over this transport."""
    p = world.problem
    if transport not in pair.transports:
        return f"runs over {', '.join(pair.transports)}, not {transport}"
    if p.layout != pair.layout:
        return f"works on the {pair.layout} layout, not {p.layout}"
    return pair.supports(world)


class RankLayer:
    """One instance of a pair on one rank, called as a layer is; made for the inputs of its first call."""

    def __init__(self, pair: RankPair, first: Inputs, world: World, link: Link) -> None:
        self.pair = pair
        self.parts = Tap(pair.prepare_finalize(first, world, link), ("prepare",))
        self.experts = Tap(pair.experts(first), ("apply",))
        self.kernel = pair.kernel(self.parts, self.experts)  # type: ignore[arg-type]

    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """What a forward call shows (SHOWN): `out` itself, and copies of what passed between the parts."""
        self.parts.calls.clear()
        self.experts.calls.clear()
        out = forward(self.kernel, inputs, self.parts.topk_indices_dtype())
        return _passed(self.pair, self.parts, self.experts) | {"out": out}

    def settle(self) -> None:
        """Raises ContractError where the last call failed on the device; not within a graph capture."""
        self.parts.settle()


def run_rank(pair: RankPair, calls: Sequence[Inputs], world: World, link: Link) -> list[dict[str, Tensor]]:
    """This rank's forward calls in turn, on one instance of the pair. What each showed (SHOWN).

    Every rank of the link must run the same calls. Raises what the candidate raises.
    """
    layer = RankLayer(pair, calls[0], world, link)
    shown = []
    for inputs in calls:
        tensors = layer(inputs)
        layer.settle()
        shown.append(tensors | {"out": tensors["out"].clone()})
    return shown


def _passed(pair: RankPair, prepare_finalize: Tap, experts: Tap) -> dict[str, Tensor]:
    """What went through the taps. Nothing where the kernel calls prepare in halves: there are several micro-batches then."""
    if "prepare" not in prepare_finalize.calls:
        return {}
    taken = dict(zip(PREPARED, prepare_finalize.calls["prepare"][1], strict=True))
    if "apply" in experts.calls:
        taken["y"] = experts.calls["apply"][1]
        if pair.taps is not None:
            taken |= {name: t.clone() for name, t in pair.taps(experts.inner).items()}  # type: ignore[arg-type]
    return {name: t for name, t in taken.items() if t is not None}
