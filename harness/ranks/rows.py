"""Which (source rank, token, slot) each dispatched row is: matched by content, since the order of rows is open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from moeproof.harness.verdict import Finding
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import Stage
from moeproof.reference.ranks.dispatch import Pair, dispatched_rows

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
Key = tuple[bytes, bytes, bytes]
"""Bytes of the row, the expert's id, and the weight's bytes where weights travel."""
Place = tuple[int, int]
"""Where a pair's result stands in y: (row, column of ids), or (local expert, row) in the batched layout."""


@dataclass(frozen=True)
class Matched:
    """What one rank received, named."""

    places: Mapping[Pair, Place]
    findings: tuple[Finding, ...]
    checked: int
    """Facts compared: one for each pair that must be there and each that is."""


def match_rows(rank: int, pairs: Sequence[Pair], sources: Sources, shown: Shown, local_experts: Sequence[int]) -> Matched:
    """Each pair that `rank` must receive against the rows it shows: the same bytes of row, expert id and weight, once each.

    Equal bytes are interchangeable: they stand for the same computation. Rows without a live id are padding.
    """
    waiting: dict[Key, list[Place]] = defaultdict(list)
    batched = "row_ids" not in shown
    present = _batched_keys(shown, local_experts) if batched else _contiguous_keys(shown)
    for key, place in present:
        waiting[key].append(place)
    places: dict[Pair, Place] = {}
    missing: list[Pair] = []
    for pair in pairs:
        key = sources.key(pair, weighted=not batched)
        if waiting[key]:
            places[pair] = waiting[key].pop(0)
        else:
            missing.append(pair)
    findings = []
    if missing:
        first = missing[0]
        words = f"no row here holds token {first.token} of rank {first.source}, slot {first.slot}{sources.hint(first, present)}"
        findings.append(_finding(words, first, rank, len(missing), len(pairs)))
    left = [place for key in waiting for place in waiting[key]]
    if left:
        words = f"rows that belong to no routed slot, the first at {left[0]}{sources.owner(left[0], present)}"
        findings.append(Finding(Stage.DISPATCH, "rows", words, rank=rank, bad=len(left), total=len(present)))
    return Matched(places, tuple(findings), len(pairs) + len(present))


def _finding(words: str, pair: Pair, rank: int, bad: int, total: int) -> Finding:
    where = {"token": pair.token, "slot": pair.slot, "expert": pair.expert, "rank": rank}
    return Finding(Stage.DISPATCH, "rows", words, bad=bad, total=total, **where)  # type: ignore[arg-type]


def _contiguous_keys(shown: Shown) -> list[tuple[Key, Place]]:
    rows, ids = byte_rows(shown["rows"]), shown["row_ids"]
    weights = shown.get("row_weights")
    found = []
    for row, column in (ids >= 0).nonzero().tolist():
        weight = b"" if weights is None else _bytes(weights[row, column])
        found.append(((rows[row], str(int(ids[row, column])).encode(), weight), (row, column)))
    return found


def _batched_keys(shown: Shown, local_experts: Sequence[int]) -> list[tuple[Key, Place]]:
    found = []
    for index, count in enumerate(shown["expert_num_tokens"].tolist()):
        expert = str(local_experts[index]).encode()
        rows = byte_rows(shown["rows"][index, :count])
        found += [((row, expert, b""), (index, n)) for n, row in enumerate(rows)]
    return found


class Sources:
    """What every rank sends, as bytes."""

    def __init__(self, ranks: Sequence[Inputs]) -> None:
        self.ranks = ranks
        self.rows = [byte_rows(dispatched_rows(inputs).flatten(0, 1)) for inputs in ranks]
        self.slots = ranks[0].topk_ids.shape[1]

    def row(self, pair: Pair) -> bytes:
        return self.rows[pair.source][pair.token * self.slots + pair.slot]

    def key(self, pair: Pair, weighted: bool) -> Key:
        weight = _bytes(self.ranks[pair.source].topk_weights[pair.token, pair.slot]) if weighted else b""
        return self.row(pair), str(pair.expert).encode(), weight

    def hint(self, pair: Pair, present: Sequence[tuple[Key, Place]]) -> str:
        """What came instead, where the row is there with another id or weight."""
        row, expert, _ = self.key(pair, weighted=True)
        same_row = [key for key, _ in present if key[0] == row]
        if not same_row:
            return ""
        if any(key[1] == expert for key in same_row):
            return "; the row is here, with another weight"
        return "; the row is here, for other experts"

    def owner(self, place: Place, present: Sequence[tuple[Key, Place]]) -> str:
        row = next(key[0] for key, where in present if where == place)
        for source, rows in enumerate(self.rows):
            if row in rows:
                return f": token {rows.index(row) // self.slots} of rank {source}"
        return ": no rank sent these bytes"


def byte_rows(rows: Tensor) -> list[bytes]:
    """The bytes of each row of (n, ..)."""
    flat = rows.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not flat.numel():
        return [b""] * flat.shape[0]
    return [row.tobytes() for row in flat.view(flat.shape[0], -1).view(torch.uint8).numpy()]


def _bytes(scalar: Tensor) -> bytes:
    return byte_rows(scalar.reshape(1, 1))[0]
