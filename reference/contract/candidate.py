"""What moeproof judges: a named callable, what it can do, and the numeric class it claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.modular import (
    FusedMoEModularKernel,
    FusedMoEPermuteExpertsUnpermute,
    FusedMoEPrepareAndFinalize,
)
from moeproof.reference.contract.problem import LAYOUTS, Problem
from moeproof.reference.contract.stages import TENSORS
from moeproof.reference.contract.world import World

ACCUMULATORS = {
    "fp32": "float32 accumulation, one rounding to the stored dtype (the contract's default)",
    "tf32": "fp32 operands rounded or truncated to 10 mantissa bits before the product",
    "dtype": "partial sums stored in the problem's dtype",
    "fp8_promoted": "fp8 operands: sums keep 13 fraction bits (Hopper), promoted to float32 every 128; others as fp32",
    "fp8_unpromoted": "fp8 operands: the whole sum keeps 13 fraction bits; others as fp32",
}
"""Integer operands on both sides are summed in int32, which is exact, under every claim."""
DECODES = {
    "exact": "codes enter the product as they are; scales multiply partial sums in float32 (the contract's default)",
    "dtype": "(q - z) * s is rounded to the problem's dtype before the product",
}
COMBINES = {
    "fp32": "slots are summed in float32 and rounded once (the contract's default)",
    "dtype": "each addition is rounded to the output dtype",
}
ACTIVATION_CLASSES = {
    "exact": "float32 arithmetic with correctly rounded or 2-ulp exp, tanh and erf",
    "approx": "hardware approximations with a relative error of up to 2^-11",
    "dtype": "each operation of the activation is rounded to the problem's dtype",
}
BACKENDS = {
    "torch": "runs wherever torch runs",
    "triton": "needs an NVIDIA GPU, or the interpreter",
    "cuda": "needs an NVIDIA GPU",
}
TRANSPORTS = {
    "simulated": "threads of one process",
    "gloo": "processes over torch.distributed's gloo, on CPU or GPU tensors",
    "symm": "processes over gloo and symmetric memory, several on one GPU if need be",
    "nccl": "one process per GPU",
}
QUANT1 = {
    "source": "each rank quantises its own tokens before dispatch; scales travel with their rows, (rows, G), a dynamic scale "
    "of a whole tensor (that of the rank's tokens) as (rows, 1) too",
    "world": "as source, but a dynamic scale of a whole tensor is that of all ranks' tokens: (1, 1), the same on every rank",
    "arrival": "rows travel in the problem's dtype, and each rank quantises what it received: a dynamic scale of a whole "
    "tensor, (1, 1), is that of the rows with a live slot there",
}
"""Where on several ranks QUANT1 stands. Scales of one token or group, and static ones, are the same under every rule."""
DETERMINISM = {
    "run": "same bits from run to run",
    "batch": "same bits whatever else is in the batch",
    "none": "within the tolerance only",
}


@dataclass(frozen=True)
class Claims:
    """The numeric contract of a candidate. Anything weaker than the default is printed in every report."""

    accumulate: str = "fp32"
    decode: str = "exact"
    """Weights of w4a16 and w8a16 schemes."""
    combine: str = "fp32"
    activation: str = "exact"
    ties: str = "any"
    """`any`: a tie may go to either expert. `lowest`: always to the lowest id, as the oracle does."""
    deterministic: str = "run"
    total_router: bool = False
    """NaN and infinite logits give the contract's defined rows (docs/contract.md)."""

    def __post_init__(self) -> None:
        known("claim accumulate", self.accumulate, ACCUMULATORS)
        known("claim decode", self.decode, DECODES)
        known("claim combine", self.combine, COMBINES)
        known("claim activation", self.activation, ACTIVATION_CLASSES)
        known("claim ties", self.ties, ("any", "lowest"))
        known("claim deterministic", self.deterministic, DETERMINISM)

    def __str__(self) -> str:
        default = Claims()
        weaker = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(default, k)]
        return ", ".join(weaker) or "default"


def _supports_all(_: Problem) -> str | None:
    return None


@dataclass(frozen=True)
class Tuning:
    """What a candidate lets `moeproof tune` choose. A configuration is a line of text; `e` counts the experts held here."""

    run: Callable[[Inputs, str], torch.Tensor | Mapping[str, torch.Tensor]]
    """The candidate's `run` with this configuration, whatever its tables say."""
    starts: Callable[[Problem, int], Sequence[str]]
    """Configurations to begin with at (problem, e), each of another kind."""
    axes: tuple[str, ...]
    """What can be changed one at a time, in the order in which it is tried."""
    vary: Callable[[str, str], Sequence[str]]
    """(configuration, axis) -> configurations that differ from it in that axis only."""
    compiled: Callable[[Problem, int], Sequence[str]]
    """Configurations that between them compile every kernel the search at (problem, e) may launch."""
    row: Callable[[Problem, int], str]
    """The row of the table that (problem, e) belongs to; its columns are numbers of tokens."""
    selectable: Callable[[], Sequence[str]]
    """Every configuration that some problem can get: all of them are to be verified, not only the chosen one."""


@dataclass(frozen=True)
class Candidate:
    """Something to judge.

    `run(inputs)` returns the final `out` tensor, or a mapping of canonical tensor names (reference.contract.stages) to
    tensors in canonical coordinates: the more it shows, the more is judged in isolation. `supports(problem)` returns None,
    or the reason why this problem is not for it; it is asked before anything runs.
    """

    name: str
    run: Callable[[Inputs], torch.Tensor | Mapping[str, torch.Tensor]]
    shows: tuple[str, ...] = ("out",)
    supports: Callable[[Problem], str | None] = _supports_all
    claims: Claims = field(default_factory=Claims)
    backend: str = "torch"
    tuning: Tuning | None = None
    """None: nothing to tune."""
    claims_in: Callable[[Problem], Claims] | None = None
    """What it claims of the kernels that a problem gets here and now, where that is more than `claims` says of all."""
    source: str = ""
    """How a command line names it where it is not installed: `module:attribute` or `path/to/file.py:attribute`."""

    def __post_init__(self) -> None:
        bad = set(self.name) & set(" ,/\n")
        check(
            bool(self.name) and not bad,
            f"candidate name '{self.name}' must be non-empty, without blanks, commas, slashes",
        )
        known(f"backend of candidate {self.name}", self.backend, BACKENDS)
        for name in self.shows:
            known(f"tensor shown by candidate {self.name}", name, TENSORS)
        check(bool(self.shows), f"candidate {self.name} shows no tensor, so nothing could be judged")


@dataclass(frozen=True)
class Pair:
    """A seed-style (prepare_finalize, experts) pair as a candidate: run through FusedMoEModularKernel, with taps.

    Both factories get the Inputs, because the seed's signatures have no room for biases and activation parameters:
    implementations take those in their constructors. The `activation` argument of `apply` is str(problem.act).
    """

    name: str
    prepare_finalize: Callable[[Inputs], FusedMoEPrepareAndFinalize]
    experts: Callable[[Inputs], FusedMoEPermuteExpertsUnpermute]
    layout: str = "standard"
    supports: Callable[[Problem], str | None] = _supports_all
    claims: Claims = field(default_factory=Claims)
    backend: str = "torch"
    slots_in_workspace2: bool = False
    """The activation's output stands in workspace2 as (M * topk, I) in (token, slot) order, so it can be judged too."""
    taps: Callable[[FusedMoEPermuteExpertsUnpermute], Mapping[str, torch.Tensor]] | None = None
    """What the experts kept of their last `apply`: h, hq, hs by name, asked after each call. In the pair's layout: (T, K, .),
    or batched (e, C, .) with undefined rows beyond the counts; one scale for the whole tensor is (1, 1, 1) in both."""
    claims_in: Callable[[Problem], Claims] | None = None
    """As Candidate.claims_in."""

    def __post_init__(self) -> None:
        known(f"layout of pair {self.name}", self.layout, LAYOUTS)
        known(f"backend of pair {self.name}", self.backend, BACKENDS)


def _supports_every_world(_: World) -> str | None:
    return None


@dataclass(frozen=True)
class RankPair:
    """A seed-style pair for several ranks: each rank builds its own, and all run FusedMoEModularKernel.forward together.

    `prepare_finalize(inputs, world, link)` gets this rank's Inputs (reference.ranks.split) and the link to the others; its
    `link.group` is the torch.distributed group where there is one. `supports(world)` returns None or the reason why not.
    """

    name: str
    prepare_finalize: Callable[[Inputs, World, Link], FusedMoEPrepareAndFinalize]
    experts: Callable[[Inputs], FusedMoEPermuteExpertsUnpermute]
    layout: str = "standard"
    supports: Callable[[World], str | None] = _supports_every_world
    claims: Claims = field(default_factory=Claims)
    backend: str = "torch"
    kernel: type[FusedMoEModularKernel] = FusedMoEModularKernel
    """What runs the two together: FusedMoEOverlappedKernel where prepare_finalize has the four calls in halves."""
    quant1: str = "source"
    """Where QUANT1 stands, a word of QUANT1. Of h there is no choice: QUANT2 is each rank's own, over its received pairs and
    its shard of I."""
    taps: Callable[[FusedMoEPermuteExpertsUnpermute], Mapping[str, torch.Tensor]] | None = None
    """As Pair.taps, in the coordinates of the rows that `apply` got."""
    transports: tuple[str, ...] = ("simulated", "gloo", "symm", "nccl")
    """Links it can use; `symm` means gloo for control and symmetric memory on the group's GPUs."""
    capturable: bool = False
    """prepare and finalize can be captured in CUDA graphs, which all ranks then replay equally often."""
    source: str = ""
    """As Candidate.source."""

    def __post_init__(self) -> None:
        known(f"layout of pair {self.name}", self.layout, LAYOUTS)
        known(f"backend of pair {self.name}", self.backend, BACKENDS)
        known(f"quant1 of pair {self.name}", self.quant1, QUANT1)
        for transport in self.transports:
            known(f"transport of pair {self.name}", transport, TRANSPORTS)
