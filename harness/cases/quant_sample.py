"""Random cases of quantised schemes: what `sample` draws, with a scheme, sizes it can hold, and values whose scales differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.sample import _pick, draw
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.schemes import ALL, SCHEMES

QUANTISED = tuple(name for name, scheme in SCHEMES.items() if scheme.quantised)
RAGGED = (16, 40, 50, 96, 130, 136, 200, 272)
"""Widths for schemes whose last group may be short: below, at and beyond one block of 128."""
KINDS = (
    *("fp8_tensor", "fp8_tensor_static", "fp8_token", "fp8_block", "int8_token"),
    *("mxfp8_up", "mxfp4_w4a4", "nvfp4", "int4_w4a16_zp_g32"),
)
"""One scheme of each kind: by tensor, static, by token, by block, integer, microscaling, two-level, zero points."""
RELATED = (*["none"] * 6, "permute", "duplicate", "split", "relabel", "flip", "double")
"""A relation runs the layer again, or twice: every second case is plain, more where a scheme rules its relation out."""
VALUES = ("groups", "groups", "edges", "ties", "hetero", "normal", "pin", "int")


def _widths(scheme: str) -> tuple[int, ...]:
    q = SCHEMES[scheme].w
    assert q is not None
    if q.ragged or q.group[1] == ALL:
        return RAGGED
    return tuple(q.group[1] * n for n in (1, 2, 3, 5) if q.group[1] * n <= 384)


def scheme_cases(scheme: str) -> list[Case]:
    """Three cases of a scheme: scales that all differ, with a short last group where it may have one; zero rows and amax at
    powers of two; and one rank of two, batched, with slots of -1."""
    q = SCHEMES[scheme].w
    assert q is not None
    # Three groups and more along either sum, and no two of H, I and 2 I alike.
    H, I = (200, 136) if q.ragged else (256, 3 * max(q.group[1], 32))  # noqa: E741  (the project's letter)
    plain = f"H={H},I={I},scheme={scheme}"
    lines = (
        f"T=9,E=3,K=2,{plain},values=groups,routing=minus1,seed=41",
        f"T=9,E=3,K=2,{plain},values=edges,seed=42",
        f"T=33,E=4,K=2,{plain},layout=batched,ep=2,ep_rank=1,values=groups,routing=minus1,seed=43",
    )
    return [parse_case(line) for line in lines]


def draw_quantised(seed: int, scheme: str | None = None, layout: str | None = None, values: str | None = None) -> Case:
    """The random quantised case of this seed: features, routing and tokens are those of a `sample.draw`.

    Axes that exclude each other are drawn again, from another plain case, so every seed gives a case.
    """
    s = Stream(seed, "quantised sample")
    while True:
        base = draw(int(s.integers(0, 2**31, 1)), layout=layout)
        own, recipe = _pick(s, QUANTISED), _pick(s, VALUES)
        widths = _widths(scheme or own)
        H, I = _pick(s, widths), _pick(s, widths)  # noqa: E741  (the project's letter)
        try:
            problem = replace(base.problem, scheme=scheme or own, H=H, I=I)
            return _related(replace(base, problem=problem, values=values or recipe, seed=seed))
        except ContractError:
            continue  # e.g. a probe that needs a saturating activation


def _related(case: Case) -> Case:
    """The case with a metamorphic relation, from a stream of its own: what else a seed draws stays what it was. Plain where
    the relation is none for this case.
    """
    relation = _pick(Stream(case.seed, "quantised relation"), RELATED)
    try:
        return replace(case, relation=relation)
    except ContractError:
        return case


def sample_quantised(count: int, start: int = 0) -> Iterator[Case]:
    """`count` random quantised cases, of the seeds from `start` on."""
    for seed in range(start, start + count):
        yield draw_quantised(seed)
