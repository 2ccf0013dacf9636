"""What is timed: layers of real models by the tokens of a call, and the least any implementation must do there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.presets import scaled
from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.router import Router

Tensor = torch.Tensor
SIZES = {
    "mixtral": (8, 2, 4096, 14336),
    "qwen3": (128, 8, 2048, 768),
    "gptoss": (128, 4, 2880, 2880),
    "dsv3ep8": (32, 1, 7168, 2048),
    "dsv3full": (256, 8, 7168, 2048),
}
"""(E, K, H, I). gptoss is its sizes with plain SwiGLU and no bias; dsv3ep8 is one rank's 32 experts, a pair for each row."""
KINDS = {
    "bf16": ("bf16", "none"),
    "fp16": ("fp16", "none"),
    "fp8b": ("bf16", "fp8_block"),
    "fp8c": ("bf16", "fp8_token"),
    "mxfp4": ("bf16", "mxfp4_w4a16"),
}
"""(dtype, scheme): what a layer computes in, under the names of the stored peers."""
KIND_MODELS = {"fp8b": ("mixtral", "qwen3", "dsv3ep8", "dsv3full"), "fp8c": ("mixtral", "qwen3", "gptoss", "dsv3ep8"),
               "mxfp4": ("qwen3", "gptoss")}  # fmt: skip
"""Models that the stored peers were timed at."""
TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)
FEW_TOKENS = {"dsv3full": (16, 256, 4096, 16384)}
ZIPF_TOKENS = (64, 1024, 16384)
ROUTINGS = ("uniform", "zipf")


@dataclass(frozen=True)
class Work:
    """One point of the grid."""

    model: str
    M: int
    routing: str = "uniform"
    kind: str = "bf16"
    """A row of KINDS."""
    small: bool = False
    """A scaled twin: for machines without a GPU."""
    layout: str = "standard"

    @property
    def named_kind(self) -> str:
        """What a reading is of, and stored peers are looked up by: theirs are of the standard layout."""
        return self.kind if self.layout == "standard" else f"{self.kind} {self.layout}"

    @property
    def problem(self) -> Problem:
        E, K, H, I = SIZES[self.model]  # noqa: E741  (the project's letter)
        dtype, scheme = KINDS[self.kind]
        problem = Problem(T=self.M, H=H, I=I, E=E, K=K, dtype=dtype, router=Router.parse("softmax:renorm=sum"))
        if self.small:
            problem = scaled(problem, self.M, 8, 64)
            # Whole groups of four-bit codes, at any width.
            problem = replace(problem, H=-(-problem.H // 32) * 32, I=-(-problem.I // 32) * 32)
        return replace(problem, scheme=scheme, layout=self.layout)

    @property
    def case(self) -> Case:
        return Case(self.problem, routing=self.routing)

    def __str__(self) -> str:
        return f"{self.model} M={self.M} {self.routing}"


def grid(
    models: tuple[str, ...] = (),
    tokens: tuple[int, ...] = (),
    routings: tuple[str, ...] = (),
    kind: str = "bf16",
    small: bool = False,
    layout: str = "standard",
) -> list[Work]:
    """The points of these models, tokens and routings; without any, those that peers were timed at."""
    known("kind", kind, KINDS)
    for model in models:
        known("model", model, SIZES)
    for routing in routings:
        known("routing", routing, ROUTINGS)
    check(all(t > 0 for t in tokens), f"tokens {tokens} must be positive")
    points = []
    for model in models or KIND_MODELS.get(kind, tuple(SIZES)):
        for routing in routings or ROUTINGS:
            usual = FEW_TOKENS.get(model, TOKENS if routing == "uniform" else ZIPF_TOKENS)
            # The stored peers have no readings here.
            if routing == "zipf" and not tokens and (model in FEW_TOKENS or kind in ("fp8c", "mxfp4")):
                continue
            points += [Work(model, M, routing, kind, small, layout) for M in tokens or usual]
    return points


@dataclass(frozen=True)
class Least:
    """The least work of a call: each operand read once, each result written once."""

    flops: float
    nbytes: float
    active: float = 0.0
    """Experts that some slot names."""

    def roof_us(self, tflops: float, gbs: float) -> float:
        """No implementation is faster, at these ceilings."""
        return max(self.flops / (tflops * 1e6), self.nbytes / (gbs * 1e3))


def least(sets: list[Inputs]) -> Least:
    """Mean over these sets of inputs: the weights of the experts that are hit, x and out."""
    flops = nbytes = active = 0.0
    for inputs in sets:
        p, ids = inputs.problem, inputs.topk_ids
        live = ids[ids >= 0]
        hit = int(live.unique().numel())
        active += hit
        per_expert = p.N * p.H + p.H * p.I
        flops += 2.0 * live.numel() * per_expert
        weights = (inputs.w1, inputs.w2, inputs.w1_scale, inputs.w2_scale)
        stored = sum(w.numel() * w.element_size() for w in weights if w is not None) / inputs.w1.size(0)
        nbytes += hit * stored + 2.0 * inputs.hidden_states.element_size() * p.T * p.H
    return Least(flops / len(sets), nbytes / len(sets), active / len(sets))
