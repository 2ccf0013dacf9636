"""What an arena holds: fields that do not touch, and how many bytes a row has on its way."""

from __future__ import annotations

import pytest
import torch

from moeproof.optimized.symm import Layout
from moeproof.optimized.symm.candidates import payload
from moeproof.optimized.symm.layout import GAP
from moeproof.reference.contract import Grid, Problem


def problem(scheme: str) -> Problem:
    return Problem(T=128, H=7168, I=2048, E=64, K=8, scheme=scheme)


SHARES = [("none", 1.0), ("fp8_block", 0.516), ("fp8_token", 0.5), ("mxfp4_w4a4", 0.266)]


@pytest.mark.parametrize(("scheme", "share"), SHARES)
def test_a_quantised_row_is_as_much_shorter_as_its_codes(scheme: str, share: float) -> None:
    """Scales included: two bytes an element are what a bf16 row has."""
    row = payload(problem(scheme))

    assert (row.row_bytes + row.scale_bytes) / (2 * 7168) == pytest.approx(share, abs=5e-4)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_fields_lie_apart_and_begin_where_any_type_can(ranks: int) -> None:
    layout = Layout(Grid(64, ranks), payload(problem("fp8_block")), 5)
    end = 0
    for name, (start, shape, dtype) in layout.fields.items():
        assert start % 256 == 0 and start - end >= GAP, name
        end = start + torch.Size(shape).numel() * dtype.itemsize
    arena = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for name in layout.fields:
        layout.view(arena, name).view(torch.uint8).fill_(0xFF)

    assert bool((layout.gaps(arena) == 0).all())
    assert int((arena == 0xFF).sum()) + layout.gaps(arena).numel() == layout.nbytes
