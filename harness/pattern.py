"""Where errors sit, in words: "all rows of expert 5", "last 7 columns", "only slot 1"."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def describe(bad: Tensor, experts: Tensor | None = None) -> str:
    """Words for a mask (T, C) or (T, K, C); `experts` (T, K) are the slots' expert ids.

    Only what explains every bad element is said; an empty string where nothing simple does.
    """
    if bad.dim() < 2 or not bool(bad.any()):
        return ""
    parts = []
    if bad.dim() == 3:
        parts += _slots(bad, experts)
    parts += _axis(bad.any(dim=-1).any(dim=-1) if bad.dim() == 3 else bad.any(dim=-1), "token", "row")
    parts += _columns(bad)
    return ", ".join(parts)


def _slots(bad: Tensor, experts: Tensor | None) -> list[str]:
    rows = bad.any(dim=-1)
    parts = []
    if experts is not None:
        hit = experts[rows].unique()
        if hit.numel() == 1:
            expert = int(hit)
            every = bool(rows[experts == expert].all())
            parts.append(f"{'all' if every else 'only'} rows of expert {expert}")
    slots = rows.any(dim=0).nonzero().flatten()
    if slots.numel() == 1 and rows.shape[1] > 1:
        parts.append(f"only slot {int(slots)}")
    return parts


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


def _columns(bad: Tensor) -> list[str]:
    hit = bad.reshape(-1, bad.shape[-1]).any(dim=0)
    parts = _axis(hit, "column", "column")
    if parts:
        return parts
    where = hit.nonzero().flatten()
    total = hit.numel()
    if where.numel() > 1 and where.numel() < total:
        for half, words in ((0, "every even column"), (1, "every odd column")):
            if bool((where % 2 == half).all()) and where.numel() * 2 >= total - 1:
                return [words]
    return []
