"""Where errors sit, in words: "all rows of expert 5", "last 7 columns of the up half", "only slot 1".

Only what explains every bad element is said.
"""

from __future__ import annotations

import torch

Tensor = torch.Tensor
M_TILES = (16, 32, 64, 128)
"""Rows that kernels work on together."""


def describe(bad: Tensor, experts: Tensor | None = None, halves: str = "") -> str:
    """Words for a mask (T, C) or (T, K, C); an empty string where nothing simple explains it.

    `experts` (T, K) are the slots' expert ids. `halves` says how gate and up lie in the columns: `packed` (gate first),
    `interleaved`, or empty where there are none.
    """
    if bad.dim() < 2 or not bool(bad.any()):
        return ""
    parts = []
    if bad.dim() == 3:
        parts += _slots(bad, experts)
    parts += _axis(bad.any(dim=-1).any(dim=-1) if bad.dim() == 3 else bad.any(dim=-1), "token", "row")
    parts += _columns(bad.reshape(-1, bad.shape[-1]).any(dim=0), halves)
    return ", ".join(parts)


def _slots(bad: Tensor, experts: Tensor | None) -> list[str]:
    rows = bad.any(dim=-1)
    parts = []
    if experts is not None:
        hit = experts[rows].unique()
        tile = _partial_tile(rows, experts)
        if hit.numel() == 1:
            expert = int(hit)
            every = bool(rows[experts == expert].all())
            parts.append(tile or f"{'all' if every else 'only'} rows of expert {expert}")
        elif tile:
            parts.append(tile)
    slots = rows.any(dim=0).nonzero().flatten()
    if slots.numel() == 1 and rows.shape[1] > 1:
        parts.append(f"only slot {int(slots)}")
    return parts


def _partial_tile(rows: Tensor, experts: Tensor) -> str:
    """The bad rows are the last, partial tile of one expert, or of every expert, in (token, slot) order."""
    hit = experts[rows].unique()
    if bool((hit < 0).any()):
        return ""
    flat, mine = experts.flatten(), rows.flatten()
    for tile in M_TILES:
        owners = flat[flat >= 0].unique().tolist()
        tails = {e: tail for e in owners if (tail := _tail(flat == e, tile)) is not None}
        if len(hit) == 1 and (tail := tails.get(int(hit))) is not None and torch.equal(tail, mine):
            return f"last partial M tile ({int(tail.sum())} of {int((flat == hit).sum())} rows) of expert {int(hit)}"
        if len(tails) > 1 and torch.equal(torch.stack(list(tails.values())).any(dim=0), mine):
            return f"last partial M tile of {tile} of every expert"
    return ""


def _tail(owned: Tensor, tile: int) -> Tensor | None:
    """bool: the rows of an expert beyond its last whole tile; None where there is no whole tile, or no row beyond."""
    where = owned.nonzero().flatten()
    rest = where.numel() % tile
    if not rest or rest == where.numel():
        return None
    return torch.zeros_like(owned).index_fill_(0, where[-rest:], True)


def _axis(hit: Tensor, name: str, plural: str) -> list[str]:
    where = hit.nonzero().flatten()
    total, count = hit.numel(), where.numel()
    if total < 2 or count == total:
        return []
    first, last = int(where[0]), int(where[-1])
    if count == 1:
        return [f"only {name} {first}"]
    if last - first + 1 == count:
        if last == total - 1:
            return [f"last {count} {plural}s"]
        if first == 0:
            return [f"first {count} {plural}s"]
        return [f"{plural}s {first} to {last}"]
    return []


def _columns(hit: Tensor, halves: str) -> list[str]:
    """Words for the bad columns; in the half's own coordinates where all lie in one half."""
    for name, columns in _halves(hit.numel(), halves):
        if bool(hit[columns].any()) and int(hit.sum()) == int(hit[columns].sum()):
            inside = hit[columns]
            if bool(inside.all()):
                return [f"the whole {name} half"]
            return [f"{(_axis(inside, 'column', 'column') or _regular(inside) or ['only columns'])[0]} of the {name} half"]
    return _axis(hit, "column", "column") or _regular(hit)


def _halves(columns: int, halves: str) -> list[tuple[str, slice]]:
    if halves == "interleaved":
        return [("gate", slice(0, None, 2)), ("up", slice(1, None, 2))]
    if halves == "packed":
        return [("gate", slice(0, columns // 2)), ("up", slice(columns // 2, None))]
    return []


def _regular(hit: Tensor) -> list[str]:
    """Every n-th column from one on, at least three of them and all of them."""
    where = hit.nonzero().flatten()
    if where.numel() < 3 or where.numel() == hit.numel():
        return []
    step = int(where[1] - where[0])
    if not bool((where.diff() == step).all()) or int(where[0]) >= step or int(where[-1]) + step < hit.numel():
        return []
    if step == 2:
        return [f"every {'odd' if int(where[0]) else 'even'} column"]
    ordinal = {3: "third"}.get(step, f"{step}th")
    return [f"every {ordinal} column from {int(where[0])}"]
