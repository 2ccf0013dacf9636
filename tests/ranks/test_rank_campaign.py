"""A sample of ci/rank_campaign.py: kills in mid-collective, and the cost of a case beside spawn-per-test."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moeproof.harness.ranks import RankPool

CI = Path(__file__).resolve().parents[2] / "ci"


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CI))
    return importlib.import_module("rank_campaign")


@pytest.fixture
def pool() -> Iterator[RankPool]:
    with RankPool(2, deadline=20.0) as pool:
        yield pool


def test_every_kill_ends_in_the_right_verdict_and_the_next_case_passes(campaign: ModuleType, pool: RankPool) -> None:
    record = campaign.kills(pool, 4)

    assert record["wrong"] == []
    assert pool.starts == 5, "new ranks after each kill"
    assert record["seconds_from_kill_to_verdict"]["max"] < 20.0


def test_a_wrong_verdict_would_be_told(campaign: ModuleType, pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that end the same way by themselves are not the victim of the kill."""
    monkeypatch.setattr(campaign, "exchanges_for_ever", campaign.skips)
    pool.deadline = 1.0

    assert len(campaign.kills(pool, 1)["wrong"]) == 1


def test_a_case_in_a_warm_pool_is_cheap(campaign: ModuleType, pool: RankPool) -> None:
    record = campaign.costs(pool, 20, 1)

    # A share, not a time: the time on a machine is in docs/results/ranks.json.
    assert record["spawn_per_case_ms"]["median"] > 20 * record["warm_pool_ms"]["median"]
