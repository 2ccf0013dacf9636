"""Which (source rank, token, slot) each dispatched row is: matched by content, since the order of rows is open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from moeproof.harness.ranks.received import Place, Shown, received_operand, wrong_shapes
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import World
from moeproof.reference.ranks.dispatch import Pair, dispatched_rows, stored_rows
from moeproof.reference.ranks.expect import RankExpectation

Tensor = torch.Tensor


NOWHERE = " and nothing like it came"
NEAR = 0.25
"""How far, relative to its largest value, a row may be from a token that it still stands for: codes of 4 bits and more."""


class Key(NamedTuple):
    """What must arrive together: the bytes of row, scales and weight (empty where they do not travel), and the expert's id."""

    row: bytes
    scales: bytes
    expert: bytes
    weight: bytes


@dataclass(frozen=True)
class Matched:
    """What one rank received, named."""

    places: Mapping[Pair, Place]
    findings: tuple[Finding, ...]
    checked: int
    """Facts compared: one for each pair that must be there and each that is."""


def match_rows(rank: int, sources: Sources, shown: Shown, local_experts: Sequence[int]) -> Matched:
    """Each pair that `rank` must receive against the rows it shows: the same bytes of everything in a Key, once each.

    Equal bytes are interchangeable: they stand for the same computation. Rows without a live id are padding.
    """
    pairs = sources.views[rank].pairs
    if wrong := wrong_shapes(sources.views[rank], shown):
        return Matched({}, (Finding(Stage.DISPATCH, *wrong, rank=rank),), 1)
    waiting: dict[Key, list[Place]] = defaultdict(list)
    batched = "row_ids" not in shown
    present = _batched_keys(shown, local_experts) if batched else _contiguous_keys(shown)
    for key, place in present:
        waiting[key].append(place)
    places: dict[Pair, Place] = {}
    missing: list[tuple[Pair, Key]] = []
    for n, pair in enumerate(pairs):
        key = sources.key(rank, n, weighted=not batched and "row_weights" in shown)
        if waiting[key]:
            places[pair] = waiting[key].pop(0)
        else:
            missing.append((pair, key))
    findings = []
    left = [(key, place) for key in waiting for place in waiting[key]]
    if missing:
        found = _missing(rank, missing, [key for key, _ in present], len(pairs))
        if found.message.endswith(NOWHERE):
            found = _quantised_otherwise(found, sources.views[rank], missing[0], left, shown)
        findings.append(found)
    if left:
        key, place = left[0]
        words = f"rows that belong to no routed slot, the first at {place}{sources.owner(key.row)}"
        findings.append(Finding(Stage.DISPATCH, "rows", words, rank=rank, bad=len(left), total=len(present)))
    return Matched(places, tuple(findings), len(pairs) + len(present))


def _missing(rank: int, missing: Sequence[tuple[Pair, Key]], present: Sequence[Key], total: int) -> Finding:
    """The first pair that is not here; its scales are blamed where its row came without them."""
    pair, key = missing[0]
    same = [other for other in present if other.row == key.row]
    tensor, hint = "rows", NOWHERE
    if any(other.expert == key.expert and other.weight == key.weight for other in same):
        tensor, hint = "row_scales", "; the row is here, with other scales"
    elif any(other.expert == key.expert for other in same):
        hint = "; the row is here, with another weight"
    elif same:
        hint = "; the row is here, for other experts"
    words = f"no row here holds token {pair.token} of rank {pair.source}, slot {pair.slot}{hint}"
    where = {"token": pair.token, "slot": pair.slot, "expert": pair.expert, "rank": rank}
    return Finding(Stage.DISPATCH, tensor, words, bad=len(missing), total=total, **where)  # type: ignore[arg-type]


def _quantised_otherwise(
    found: Finding, view: RankExpectation, missing: tuple[Pair, Key], left: Sequence[tuple[Key, Place]], shown: Shown
) -> Finding:
    """The finding as one of QUANT1, where a row that nobody sent stands for the missing token all the same: in other codes."""
    pair, key = missing
    places = [place for other, place in left if other.expert == key.expert]
    if view.operand is None or not places:
        return found
    n = view.pairs.index(pair)
    got, want = received_operand(view, shown, places), view.operand
    distance = (got.values - want.values[n]).abs().amax(dim=1).nan_to_num(nan=torch.inf)
    nearest = int(distance.argmin())
    if not float(distance[nearest]) <= NEAR * float(want.values[n].abs().max()):
        return found
    codes, scales = got.q[nearest] != want.q[n], got.s[min(nearest, len(got.s) - 1)] != want.s[min(n, len(want.s) - 1)]
    words = f"token {pair.token} of rank {pair.source} came in other codes: {int(codes.sum())} of {codes.numel()} differ"
    words += f", and {int(scales.sum())} of {scales.numel()} scales"
    return replace(found, stage=Stage.QUANT1, message=words)


def _contiguous_keys(shown: Shown) -> list[tuple[Key, Place]]:
    rows, ids = byte_rows(shown["rows"]), shown["row_ids"]
    scales = _beside(shown.get("row_scales"), len(rows))
    weights = shown.get("row_weights")
    found = []
    for row, column in (ids >= 0).nonzero().tolist():
        weight = b"" if weights is None else _bytes(weights[row, column])
        found.append((Key(rows[row], scales[row], _name(int(ids[row, column])), weight), (row, column)))
    return found


def _batched_keys(shown: Shown, local_experts: Sequence[int]) -> list[tuple[Key, Place]]:
    found = []
    every = shown.get("row_scales")
    for index, count in enumerate(shown["expert_num_tokens"].tolist()):
        rows = byte_rows(shown["rows"][index, :count])
        scales = _beside(None if every is None else every[index], len(rows))
        expert = _name(local_experts[index])
        found += [(Key(row, scales[n], expert, b""), (index, n)) for n, row in enumerate(rows)]
    return found


def _beside(scales: Tensor | None, rows: int) -> list[bytes]:
    """The scales of each of so many rows: (rows or more, G), or (1, 1) for all."""
    if scales is None:
        return [b""] * rows
    found = byte_rows(scales)
    return found * rows if len(found) == 1 else found


class Sources:
    """What every rank must receive, as bytes."""

    def __init__(self, world: World, views: Sequence[RankExpectation]) -> None:
        self.views = views
        ranks = [view.inputs for view in views]
        self._keys: list[tuple[list[bytes], list[bytes]]] = []
        self._owners: dict[bytes, tuple[int, int]] = {}
        for view in views:
            rows, scales = stored_rows(world, ranks, view.pairs, view.operand)
            self._keys.append((byte_rows(rows), _beside(scales, len(view.pairs))))
            self._owners |= {row: (p.source, p.token) for p, row in zip(view.pairs, self._keys[-1][0], strict=True)}
        if world.problem.quant.a1 is None:
            for rank, inputs in enumerate(ranks):
                slots = max(inputs.topk_ids.shape[1], 1)
                rows_of = byte_rows(dispatched_rows(inputs).flatten(0, 1))
                self._owners |= {row: (rank, n // slots) for n, row in enumerate(rows_of)}

    def key(self, rank: int, n: int, weighted: bool) -> Key:
        """The n-th pair of `rank`."""
        pair, (rows, scales) = self.views[rank].pairs[n], self._keys[rank]
        weight = _bytes(self.views[pair.source].inputs.topk_weights[pair.token, pair.slot]) if weighted else b""
        return Key(rows[n], scales[n], _name(pair.expert), weight)

    def owner(self, row: bytes) -> str:
        """Whose row these bytes are, in words."""
        if row in self._owners:
            rank, token = self._owners[row]
            return f": token {token} of rank {rank}"
        return ": no rank sent these bytes"


def _name(expert: int) -> bytes:
    return str(expert).encode()


def byte_rows(rows: Tensor) -> list[bytes]:
    """The bytes of each row of (n, ..)."""
    flat = rows.detach().cpu().clone(memory_format=torch.contiguous_format)
    if not flat.numel():
        return [b""] * flat.shape[0]
    return [row.tobytes() for row in flat.view(flat.shape[0], -1).view(torch.uint8).numpy()]


def _bytes(scalar: Tensor) -> bytes:
    return byte_rows(scalar.reshape(1, 1))[0]
