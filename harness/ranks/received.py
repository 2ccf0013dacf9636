"""What the rows that a rank shows are: their shapes and dtypes, their bytes by place, the values they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moeproof.reference.oracle.quantise import Quantised, dequantise
from moeproof.reference.ranks.expect import RankExpectation

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
Place = tuple[int, int]
"""Where a pair's result stands in y: (row, column of ids), or (local expert, row) in the batched layout."""


def wrong_shapes(view: RankExpectation, shown: Shown) -> tuple[str, str] | None:
    """(tensor, what is wrong with its shape or dtype); None where rows and their scales can be told apart at all."""
    p, operand, rows = view.inputs.problem, view.operand, shown["rows"]
    scales = shown.get("row_scales")
    if operand is None:
        what = "x is not quantised, so there are no scales to send"
        return None if scales is None else ("row_scales", f"is {tuple(scales.shape)} {scales.dtype}, must be None: {what}")
    q = operand.quantiser
    want = q.code_shape(*rows.shape[:-1], p.hidden)
    if (tuple(rows.shape), rows.dtype) != (want, q.format.dtype):
        return "rows", f"is {tuple(rows.shape)} {rows.dtype}, must be {want} {q.format.dtype}: codes of scheme {p.scheme}"
    need, dtype = q.scale_shape(*rows.shape[:-1], p.hidden), q.scale_format(p.fmt).dtype
    if scales is None or (tuple(scales.shape), scales.dtype) != (need, dtype):
        got = "missing" if scales is None else f"{tuple(scales.shape)} {scales.dtype}"
        return "row_scales", f"is {got}, must be {need} {dtype}: scales of scheme {p.scheme}"
    return None


def received_operand(view: RankExpectation, shown: Shown, places: Sequence[Place]) -> Quantised:
    """What the candidate's own codes and scales stand for at some places of its rows."""
    assert view.operand is not None
    q, p = view.operand.quantiser, view.inputs.problem
    scales = shown["row_scales"]
    scales = at_rows(scales, places) if q.by_token else scales.flatten()[:1].view(1, 1)
    return dequantise(q, p.fmt, at_rows(shown["rows"], places), scales, g=view.inputs.a1_scale if q.two_level else None)


def at_rows(rows: Tensor, places: Sequence[Place]) -> Tensor:
    """(n, .) of rows (n, .) or (e, C, .): what stands at each place. By bytes: not every narrow dtype can be indexed."""
    flat = rows.flatten(0, 1) if rows.dim() == 3 else rows
    index = [a * rows.shape[1] + b for a, b in places] if rows.dim() == 3 else [a for a, _ in places]
    return pick(flat, index)


def pick(flat: Tensor, index: Sequence[int]) -> Tensor:
    """flat (n, .)[index], by bytes."""
    if not index:
        return flat[:0]
    return flat.contiguous().view(torch.uint8)[torch.tensor(index, device=flat.device)].view(flat.dtype)
