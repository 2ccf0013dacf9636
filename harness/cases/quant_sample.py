"""Random cases of quantised schemes: what `sample` draws, with a scheme, sizes it can hold, and values whose scales differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.generator import Stream
from moeproof.harness.cases.sample import _pick, draw
from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.schemes import ALL, SCHEMES

QUANTISED = tuple(name for name, scheme in SCHEMES.items() if scheme.quantised)
RAGGED = (16, 40, 50, 96, 130, 136, 200, 272)
"""Widths for schemes whose last group may be short: below, at and beyond one block of 128."""
VALUES = ("groups", "groups", "edges", "ties", "hetero", "normal", "pin", "int")


def _widths(scheme: str) -> tuple[int, ...]:
    q = SCHEMES[scheme].w
    assert q is not None
    if q.ragged or q.group[1] == ALL:
        return RAGGED
    return tuple(q.group[1] * n for n in (1, 2, 3, 5) if q.group[1] * n <= 384)


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
            return replace(base, problem=problem, values=values or recipe, seed=seed)
        except ContractError:
            continue  # e.g. a probe that needs a saturating activation


def sample_quantised(count: int, start: int = 0) -> Iterator[Case]:
    """`count` random quantised cases, of the seeds from `start` on."""
    for seed in range(start, start + count):
        yield draw_quantised(seed)
