"""ci/rank_faults.py: every planted fault of several ranks over simulated ranks, and what hangs or dies over processes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from moeproof.harness.faults.on_ranks import BY_NAME, FAULTS
from moeproof.harness.ranks.session import RankSession

CI = Path(__file__).resolve().parents[2] / "ci"
RANKS, DEADLINE = 3, 3.0
THREADS = [fault.name for fault in FAULTS if not fault.processes_only]
PROCESSES = ("P78", "P79", "P80", "short_exchange", "stalls", "dies", "P83", "P75", "P96")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(CI))
    return importlib.import_module("rank_faults")


@pytest.fixture(scope="module")
def gloo_session() -> Iterator[RankSession]:
    session = RankSession(RANKS, "gloo", DEADLINE)
    yield session
    session.close()


@pytest.mark.parametrize("name", THREADS)
def test_simulated_ranks_catch_it(table: ModuleType, name: str) -> None:
    (row,) = table.table([BY_NAME[name]], RANKS, "simulated", DEADLINE)

    assert "not_run" not in row and table.right(row), row


@pytest.mark.parametrize("name", PROCESSES)
def test_processes_catch_it(table: ModuleType, gloo_session: RankSession, name: str) -> None:
    row = table.hunt(BY_NAME[name], gloo_session)

    assert table.right(row), row


def test_a_fault_that_never_fires_is_told(table: ModuleType) -> None:
    """The twin in the fault's place: nothing is caught, and the row says so."""
    harmless = replace(BY_NAME["P27"], wrong=lambda right, here, *arguments: right(*arguments))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BY_NAME, "P27", harmless)
        (row,) = table.table([harmless], RANKS, "simulated", DEADLINE)

    assert not row["caught"] and not table.right(row)
