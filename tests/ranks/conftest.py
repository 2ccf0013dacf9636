"""Pools of ranks over gloo, one of each size, started where a test asks for them and kept for the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from gloo_ranks import GlooRanks


@pytest.fixture(scope="session")
def gloo() -> Iterator[GlooRanks]:
    ranks = GlooRanks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def unrecorded_gloo() -> Iterator[GlooRanks]:
    """For collectives that do not match: what an implementation itself makes of them, where no pool compares."""
    ranks = GlooRanks(record=False)
    yield ranks
    ranks.close()
