"""Campaigns over the quantised candidates: which case each seed stands for, and what a row counts.

A row is a scheme in a layout, judged by the candidates that do every scheme of it by turns, or by one candidate alone that
does a few. It adds up: pieces of seeds in any order, from one run or from several, each seed judged once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import SCHEMES, Activation, Candidate, Problem
from moeproof.reference.contract.problem import LAYOUTS

T = TypeVar("T")
Key = tuple[str, str, str]
"""Scheme, layout, and the candidate that judges alone, or ""."""
PRIMARY = {
    "standard": ("triton-fp8", "triton-fp8-modular", "triton-quant", "triton-quant-modular"),
    "batched": ("triton-fp8-batched", "triton-quant-batched"),
}
"""One of those that support a case judges it; they take turns."""
_TOKENS_CHANNELS = ("fp8_token",)
ALONE = {
    "triton-fp8-fused": ("fp8_token", "fp8_block"),
    "triton-fp8-fast": ("fp8_token", "fp8_block"),
    "triton-mxfp4": ("mxfp4_w4a16",),
    "torch-scaled-grouped": _TOKENS_CHANNELS,
    "cuda-fp8": _TOKENS_CHANNELS,
    "cuda-fp8-modular": _TOKENS_CHANNELS,
    "triton-quant-cuda-gemm": _TOKENS_CHANNELS,
    "cuda-quant-triton-gemm": (
        *("fp8_tensor_static", "fp8_token", "fp8_block", "int8_token", "int4_w4a8", "mxfp8", "mxfp8_up"),
        *("mxfp6_e3m2", "mxfp6_e2m3", "mxfp4_w4a8", "mxfp4_w4a8_up", "mxfp4_w4a8_static", "mxfp4_w4a4", "mxfp4_w4a4_up"),
    ),
}
"""The other optimized candidates and the schemes that they do, in the standard layout: a row of each."""
INTERPRETED = ("triton-fp8-fused", "triton-fp8-fast", "triton-mxfp4")
"""Those of them that need no GPU."""
CANDIDATES = (*PRIMARY["standard"], *PRIMARY["batched"], *ALONE)
PRODUCTS = ("gate_up", "y")
PROBE = 4
"""Every so manyth case is the exact probe."""
ACTIVATIONS = ("silu", "silu", "silu", "swigluoai", "relu2_no_mul")
VALUES = ("groups", "groups", "edges", "ties", "hetero", "normal")
EXPERTS = 350
"""From this seed on every fourth draw spreads the experts too (the recipe is younger than the seeds before)."""
ATTEMPTS = 16
"""Draws of a seed, until one is not VACUOUS: groups of columns that differ by 9 binades may leave a last tile too little."""
TRIES = 1000
"""Draws of a shape, until the candidate that judges alone supports it."""
KEPT = 8
"""Failures of a row that are written out; all are counted."""


@dataclass(frozen=True)
class Sizes:
    """What a mode draws from. (H, I) are rounded up to what the scheme's groups allow."""

    widths: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    share: int
    """Seeds in a row that share sizes, dtype, activation, storage and strides: what a kernel is compiled for."""


# Both have rows of several scale blocks and a short last one, several column tiles, and row tiles that end anywhere. In the
# interpreter a program costs milliseconds, so cases are small; on a GPU a kernel costs seconds to compile, so they share it.
SIZES = {
    "interpret": Sizes(((168, 40), (40, 168), (200, 72), (72, 264)), (1, 2, 3, 5, 7, 9, 17), (3, 4), 4),
    "device": Sizes(
        ((128, 168), (200, 64), (384, 256), (168, 40), (296, 392)), (1, 3, 7, 17, 33, 64, 130, 257), (3, 4, 7), 125
    ),
}


def _pick(s: Stream, options: Sequence[T]) -> T:
    return options[int(s.integers(0, len(options), 1))]


def _unit(scheme: str) -> int:
    """Columns that H and I must be multiples of."""
    row = SCHEMES[scheme]
    return max([8, *(q.group[1] for q in (row.a1, row.a2, row.w) if q is not None and not q.ragged)])


def rows(mode: str) -> list[Key]:
    """All rows of this mode: each scheme in both layouts, then each candidate that judges alone."""
    alone = INTERPRETED if mode == "interpret" else tuple(ALONE)
    quantised = [name for name, scheme in SCHEMES.items() if scheme.quantised]
    by_turns = [(scheme, layout, "") for scheme in quantised for layout in LAYOUTS]
    return by_turns + [(scheme, "standard", name) for name in alone for scheme in ALONE[name]]


def _shape(scheme: str, layout: str, group: int, mode: str, again: int) -> tuple[Problem, bool]:
    """What the seeds of a group share: the problem and whether arguments are strided; `again` counts earlier draws."""
    sizes, unit = SIZES[mode], _unit(scheme)
    s = Stream(group, f"quant campaign shapes {scheme} {layout}" + f" {again}" * bool(again))
    H, I = (-(-size // unit) * unit for size in _pick(s, sizes.widths))  # noqa: E741  (the project's letter)
    tokens, experts, slots = _pick(s, sizes.tokens), _pick(s, sizes.experts), _pick(s, (1, 2, 3))
    dtype, act = _pick(s, ("bf16", "bf16", "fp16", "fp32")), _pick(s, ACTIVATIONS)
    weighted, bias, kn, strided = (int(s.integers(0, one_of, 1)) == 0 for one_of in (4, 4, 4, 8))
    problem = Problem(
        T=tokens,
        H=H,
        I=I,
        E=experts,
        K=slots,
        dtype=dtype,
        scheme=scheme,
        act=Activation.parse(act),
        expert_bias=bias,
        weight_on_input=weighted and slots == 1,
        layout=layout,
        storage="KN" if kn else "NK",
    )
    return problem, strided


def draw(scheme: str, layout: str, seed: int, mode: str, attempt: int = 0, alone: Candidate | None = None) -> Case:
    """The case of this seed; each attempt is another one of the same shapes, which `alone` supports."""
    group, probe = seed // SIZES[mode].share, seed % PROBE == PROBE - 1
    shapes = (_shape(scheme, layout, group, mode, again) for again in range(TRIES))
    # Where it supports none, e.g. for want of a compiler, it is asked about the first and the verdict says why.
    able = (shape for shape in shapes if alone is None or alone.supports(shape[0]) is None)
    problem, strided = next(able, None) or _shape(scheme, layout, group, mode, 0)
    s = Stream(seed, f"quant campaign {scheme} {layout} {attempt}")
    routing = _pick(s, ("uniform", "hot", "minus1", "dup", "zipf"))
    values = _pick(s, VALUES if seed < EXPERTS else (*VALUES, "experts", "experts"))
    if probe:
        dtype = "bf16" if problem.dtype == "fp16" else problem.dtype
        problem = replace(problem, dtype=dtype, act=Activation.parse("silu"), weight_on_input=False)
    return Case(problem, values="pin" if probe else values, routing=routing, strided=strided, seed=seed)


def whose_turn(case: Case, candidates: dict[str, Candidate], turn: int) -> Candidate:
    """Who judges this case in the row of its layout."""
    able = [c for name in PRIMARY[case.problem.layout] if (c := candidates[name]).supports(case.problem) is None]
    return able[turn % len(able)]


@dataclass
class Row:
    """What is known of one scheme in one layout, of one candidate alone or of those that take turns."""

    scheme: str
    layout: str
    done: list[list[int]] = field(default_factory=list)
    """Ranges [first, end) of seeds that were judged, in order, apart from each other."""
    verdicts: int = 0
    probes: int = 0
    redrawn: int = 0
    """Draws given up because a verdict would have been VACUOUS."""
    outcomes: dict[str, int] = field(default_factory=dict)
    candidates: dict[str, int] = field(default_factory=dict)
    checked: int = 0
    """Facts: one shape and one dtype for each tensor, and every element."""
    worst: dict[str, float] = field(default_factory=dict)
    """Largest observed/allowed by tensor."""
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    alone: str = ""
    sums: dict[str, float] = field(default_factory=dict)
    """As `worst`, of products in fp32 problems: no rounding of the output, half an ulp of which is allowed and common."""

    @property
    def key(self) -> Key:
        return self.scheme, self.layout, self.alone

    @property
    def cases(self) -> int:
        return sum(end - first for first, end in self.done)

    def missing(self, count: int) -> list[int]:
        """Seeds below `count` that were not judged."""
        judged = {seed for first, end in self.done for seed in range(first, end)}
        return [seed for seed in range(count) if seed not in judged]

    def count(self, verdict: Verdict) -> None:
        self.verdicts += 1
        self.probes += verdict.case.values == "pin"
        self.checked += verdict.checked
        for counts, key in ((self.outcomes, verdict.outcome.value), (self.candidates, verdict.candidate)):
            counts[key] = counts.get(key, 0) + 1
        for name, ratio in verdict.worst.items():
            self.worst[name] = max(self.worst.get(name, 0.0), round(ratio, 4))
            if name in PRODUCTS and verdict.case.problem.dtype == "fp32":
                self.sums[name] = max(self.sums.get(name, 0.0), round(ratio, 4))
        if verdict.outcome is not Outcome.PASS and len(self.failures) < KEPT:
            what = str(verdict.findings[0]) if verdict.findings else verdict.reason
            replay = f'moeproof replay "{verdict.case}" --candidate {verdict.candidate}'
            self.failures.append(f"{verdict.outcome.value}: {replay}: {what}")

    def add(self, other: Row) -> None:
        """Another piece of the same row."""
        assert self.key == other.key
        spans = sorted(self.done + other.done)
        self.done = spans[:1]
        for first, end in spans[1:]:
            if first == self.done[-1][1]:
                self.done[-1] = [self.done[-1][0], end]
            else:
                self.done.append([first, end])
        for name in ("verdicts", "probes", "redrawn", "checked"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("outcomes", "candidates"):
            setattr(self, name, dict(Counter(getattr(self, name)) + Counter(getattr(other, name))))
        for mine, others in ((self.worst, other.worst), (self.sums, other.sums)):
            for name, ratio in others.items():
                mine[name] = max(mine.get(name, 0.0), ratio)
        self.seconds = round(self.seconds + other.seconds, 2)
        self.failures = (self.failures + other.failures)[:KEPT]

    def record(self) -> dict[str, Any]:
        """For a results file; `Row(**record)` without `cases` is the row again."""
        known = {"scheme": self.scheme, "layout": self.layout, "alone": self.alone, "cases": self.cases}
        return known | {name: value for name, value in vars(self).items() if name not in known}


def judge_piece(key: Key, seeds: Sequence[int], mode: str, until: float, candidates: dict[str, Candidate]) -> Row:
    """The row of these seeds alone. None is begun after `until`, by time.time(), nor once the device is lost."""
    scheme, layout, alone = key
    row, start = Row(scheme, layout, alone=alone), time.perf_counter()
    for seed in seeds:
        if time.time() > until or (mode == "device" and lost()):
            break
        row.count(_judge(row, seed, mode, candidates))
        row.add(Row(scheme, layout, [[seed, seed + 1]], alone=alone))
    row.seconds = round(time.perf_counter() - start, 2)
    return row


def _judge(row: Row, seed: int, mode: str, candidates: dict[str, Candidate]) -> Verdict:
    """The verdict on the first draw of this seed that is not VACUOUS."""
    alone = candidates[row.alone] if row.alone else None
    for attempt in range(ATTEMPTS):
        case = draw(row.scheme, row.layout, seed, mode, attempt, alone)
        verdict = judge(alone or whose_turn(case, candidates, seed), case)
        if verdict.outcome is not Outcome.VACUOUS:
            break
        row.redrawn += 1
    return verdict


def lost() -> bool:
    """Whether a fault has left this process without its GPU: every later call would fail."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
