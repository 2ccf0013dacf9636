"""The input lint: whether a case can see the faults it is there to see (docs/tolerances.md, 7.1).

A complaint is about the inputs alone, in words, and makes a verdict VACUOUS that would be PASS. The exact probes are free of
most rules: there every bit is compared, so that no magnitude can hide an error. What each recipe must see is recipes' own:
tests/harness/test_recipes.py.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.judging.expect import Expectation
from moeproof.harness.judging.trial import expectation_of, inputs_of
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.activations import split
from moeproof.reference.oracle.experts import live_slots, local_ids

Tensor = torch.Tensor
EXACT = ("int", "sat", "tagged", "wide", "sweep")
"""Recipes whose GEMM1 is compared bit by bit."""
RMS = (0.3, 3.0)
"""Of pre-activations, in units of half the activation's limit where it has one; a tenth of the lower end, of outputs."""
SPREAD = {"normal": 1.0, "asym": 1.0, "cancel": 1.0, "clamp": 4.0, "tail": 2.5}
"""Recipes whose pre-activations have one scale, and by what they may exceed RMS: the purpose of the last two. The others
spread their magnitudes over many binades on purpose; there the gate says whether a bound still rejects what is wrong."""
APART = 1.05
"""Ratio by which the rms of gate and up must differ, so that swapped halves show."""
RATIO = 1.15
"""Least ratio of two routing weights of one token."""
ENOUGH = 1024
"""Numbers below which a statistic says nothing: the rms of half as many is off by 3% by chance."""
PAIRS = 16
"""Pairs of weights below which a share says nothing."""
ALIKE = 4
"""One pair of neighbouring weights in so many may be alike: powers of two repeat after six slots."""


DISTINCT = {"groups": ("group", "row"), "hetero": ("row",), "edges": ("row",)}
"""Recipes that give neighbouring scales other magnitudes, and along which axes."""
DIFFER = 0.6
"""Least share of neighbouring scales that differ. Powers of two for groups of 32 lie one step apart, and amax moves a quarter
of them onto their neighbour; whether confusing them shows in a result is the gate's to say."""
DEFAULT = Claims()


@functools.lru_cache(maxsize=64)
def lint(case: Case, device: str = "cpu", claims: Claims = DEFAULT) -> tuple[str, ...]:
    """Complaints about a case; empty where its inputs are fit to be judged with. The claims only save a second oracle."""
    return tuple(complaints(case, expectation_of(case, device, claims)))


def complaints(case: Case, expect: Expectation) -> Iterable[str]:
    """The same about these inputs."""
    live = live_slots(expect.inputs)
    if not bool(live.any()):
        return  # nothing is computed: exact zeros are asked for
    yield from _weights(case, expect.inputs, live)
    yield from _experts(case, expect.inputs)
    if case.values not in EXACT:
        yield from _magnitudes(case, expect, live)
    if case.problem.quant.quantised:
        yield from _scales(case, expect.inputs)


def _rms(x: Tensor) -> float:
    return float((x.double() ** 2).mean().sqrt()) if x.numel() else 0.0


def _magnitudes(case: Case, expect: Expectation, live: Tensor) -> Iterable[str]:
    """Pre-activations where activations differ, halves that can be told apart, outputs above every floor."""
    p = case.problem
    gate_up = expect.chained("gate_up").value[live]
    # A bias of order one in every column is what sets the rms then, and what tells the halves apart.
    if gate_up.numel() < ENOUGH or case.values not in SPREAD or p.expert_bias:
        return
    low, high = (bound * (p.act.limit / 2 if p.act.limit else 1.0) for bound in RMS)
    high *= SPREAD[case.values]
    rms = _rms(gate_up)
    if not low <= rms <= high:
        yield f"pre-activations have an rms of {rms:.3g}, outside [{low:.3g}, {high:.3g}]"
    gate, up = (_rms(half) for half in split(gate_up, p.act)) if p.act.gated else (1.0, 2.0)
    if max(gate, up) < APART * min(gate, up):
        yield f"gate and up have the same rms ({gate:.3g} and {up:.3g}): swapped halves hardly show"
    y = expect.chained("y").value[live]
    if (rms := _rms(y)) < RMS[0] / 10:
        yield f"expert outputs have an rms of {rms:.3g}: an absolute floor could hide an error"


def _weights(case: Case, inputs: Inputs, live: Tensor) -> Iterable[str]:
    """Routing weights of one token must be told apart, or a weight that goes to the wrong slot is no fault."""
    p = case.problem
    if case.routing == "router" or p.K < 2 or case.values == "cancel":
        return  # a router's own weights are what they are; cancelling pairs are nearly alike on purpose
    w = torch.where(live, inputs.topk_weights.double(), torch.nan)[:, : p.K]
    if bool((w <= 0).any()):
        yield "a routing weight is not positive: whatever its slot holds hardly counts"
    neighbours = w / w.roll(1, dims=1)
    apart = torch.maximum(neighbours, 1 / neighbours)
    comparable = apart.isfinite()
    close = int((apart[comparable] < RATIO).sum())
    if close * ALIKE > max(int(comparable.sum()), PAIRS):
        of = f"{close} of {int(comparable.sum())} neighbouring routing weights"
        yield f"{of} differ by less than {RATIO}: rolled ones hardly show"


def _experts(case: Case, inputs: Inputs) -> Iterable[str]:
    """No two experts alike: else the wrong one's weights are no fault."""
    if case.values == "sweep":
        return
    named = local_ids(inputs).unique()
    named = named[named >= 0]
    # In the pairs that cancel only half of w2 differs.
    for name in ("w2",) if case.values in ("cancel", "tagged") else ("w1", "w2"):
        w = getattr(inputs, name)[named].flatten(1)
        # A hash of the bits by a random projection: equal only where the bits are.
        keys = torch.arange(1, w.shape[1] + 1, dtype=torch.float64, device=w.device).sin()
        if w.shape[0] > 1 and (w.double() @ keys).unique().numel() < w.shape[0]:
            yield f"two experts have the same {name}: confusing them is no fault"


def _scales(case: Case, inputs: Inputs) -> Iterable[str]:
    """Scales that are alike cannot be confused: most neighbours along groups and rows must differ."""
    for name in ("w1_scale", "w2_scale"):
        scale = getattr(inputs, name)
        bits = scale.view(torch.uint8) if scale.element_size() == 1 else scale
        for axis, dim in (("group", 2), ("row", 1)):
            if bits.shape[dim] < 2 or axis not in DISTINCT.get(case.values, ()):
                continue
            differ = (bits.narrow(dim, 1, bits.shape[dim] - 1) != bits.narrow(dim, 0, bits.shape[dim] - 1)).double()
            if differ.numel() >= PAIRS and float(differ.mean()) < DIFFER:
                yield f"only {float(differ.mean()):.0%} of {name} differ from the next {axis}'s: confusing them hardly shows"


def lint_all(cases: Iterable[Case]) -> list[str]:
    """Complaints about a set of cases: what none of them has."""
    seen: set[str] = set()
    for case in cases:
        p = case.problem
        ids = inputs_of(case, "cpu").topk_ids
        if not ids.numel():
            seen.add("a batch without tokens")
            continue
        counts = torch.bincount(ids[(ids >= 0) & (ids < p.E)].long().flatten(), minlength=p.E)
        seen |= {f"a count of {r} modulo 16" for r in (counts[counts > 0] % 16).unique().tolist() if r in (0, 1, 15)}
        seen |= {
            f"the {name} expert"
            for name, e in (("first", 0), ("middle", p.E // 2), ("last", p.E - 1))
            if int(counts[e]) and p.E > 2
        }
        seen |= {f"no token for the {name} expert" for name, e in (("first", 0), ("last", p.E - 1)) if not int(counts[e])}
        for axis in ("T", "H", "I"):
            seen |= {f"{axis} with a partial tile of 16"} if getattr(p, axis) % 16 else {f"{axis} of whole tiles of 16"}
        if bool((ids == -1).any()):
            seen.add("a slot of -1")
        if bool((ids == -1).all(dim=1).any()):
            seen.add("a row of -1")
        ordered = ids.sort(dim=1).values
        if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
            seen.add("an expert named twice by one token")
    return [f"no case has {what}" for what in WANTED if what not in seen]


WANTED = (
    "a batch without tokens",
    *(f"a count of {r} modulo 16" for r in (0, 1, 15)),
    *("the first expert", "the middle expert", "the last expert"),
    *(f"no token for the {name} expert" for name in ("first", "last")),
    *(f"{axis} {how}" for axis in ("T", "H", "I") for how in ("with a partial tile of 16", "of whole tiles of 16")),
    *("a slot of -1", "a row of -1", "an expert named twice by one token"),
)
