"""Pairwise covering arrays: few rows in which every two values of different axes meet at least once.

Greedy and deterministic, after AETG (Cohen, Dalal, Fredman and Patton, 1997): each row starts from a pair that is still
missing and fills the other axes, in a shuffled order, with the value that covers most missing pairs. Sixty lines serve
here because impossible combinations are a function of ours; no dependency would take them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from moeproof.harness.cases.generator import Stream

Axes = Mapping[str, Sequence[object]]
Row = dict[str, object]
Pair = tuple[tuple[str, object], tuple[str, object]]
Possible = Callable[[Row], bool]
"""Whether a partial row may still become a whole one. A whole row that it allows must be possible."""
TRIES = 2
"""Orders in which the axes of a row are filled before its best filling is taken."""
DEAD_ENDS = 40
"""Fillings that may fail before the pair they started from counts as impossible."""


def pairs(axes: Axes, possible: Possible) -> list[Pair]:
    """Every pair of values of two axes that is possible by itself, in a fixed order."""
    return [
        ((a, x), (b, y)) for a, b in itertools.combinations(axes, 2) for x in axes[a] for y in axes[b] if possible({a: x, b: y})
    ]


def pairs_of(row: Row, axes: Axes) -> set[Pair]:
    return {((a, row[a]), (b, row[b])) for a, b in itertools.combinations(axes, 2)}


def cover(axes: Axes, possible: Possible, seed: int = 0, given: Iterable[Row] = ()) -> tuple[list[Row], list[Pair]]:
    """(rows, pairs that no row could be found for). Every other possible pair stands in some row, or in a given one."""
    stream = Stream(seed, "pairwise")
    allowed = pairs(axes, possible)
    missing = dict.fromkeys(allowed)
    for one in given:
        for pair in pairs_of(one, axes):
            missing.pop(pair, None)
    known = frozenset(allowed)
    rows: list[Row] = []
    hopeless: list[Pair] = []
    while missing:
        start = next(iter(missing))
        best, most = None, -1
        found = failed = 0
        while found < TRIES and failed < DEAD_ENDS:
            row = _filled(dict(start), axes, possible, known, missing, stream)
            if row is None:
                failed += 1
                continue
            found += 1
            gain = len(pairs_of(row, axes) & missing.keys())
            if gain > most:
                best, most = row, gain
        if best is None:
            hopeless.append(start)
            del missing[start]
            continue
        rows.append({axis: best[axis] for axis in axes})
        for pair in pairs_of(best, axes):
            missing.pop(pair, None)
    return rows, hopeless


def _filled(
    row: Row, axes: Axes, possible: Possible, known: Collection[Pair], missing: Mapping[Pair, None], stream: Stream
) -> Row | None:
    """The row with its other axes chosen; None where an axis has no possible value left."""
    names = list(axes)
    order = [names[i] for i in stream.shuffled(len(names)).tolist() if names[i] not in row]
    for axis in order:
        values = list(axes[axis])
        meets = [_pairs_with(row, axis, value, names) for value in values]
        gains = [sum(pair in missing for pair in mine) for mine in meets]
        # Best first; among equals in a drawn order, so that no value is always the filler.
        draw = stream.shuffled(len(values)).tolist()
        for i in sorted(range(len(values)), key=lambda i: (-gains[i], draw[i])):
            row[axis] = values[i]
            # Each of its pairs by itself first: that is known, and rules most out.
            if all(pair in known for pair in meets[i]) and possible(row):
                break
        else:
            return None
    return row


def _pairs_with(row: Row, axis: str, value: object, names: list[str]) -> list[Pair]:
    """What this value would meet in the row."""
    at = names.index(axis)
    return [
        ((axis, value), (other, chosen)) if at < names.index(other) else ((other, chosen), (axis, value))
        for other, chosen in row.items()
        if other != axis
    ]
