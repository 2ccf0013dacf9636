"""docs/cuda.md says of each stage's speed what the results file says, and targets are held as they are stated."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cuda_timings(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "ci")
    return importlib.import_module("cuda_timings")


def test_the_page_is_of_the_results_file(cuda_timings: ModuleType) -> None:
    rows = json.loads((ROOT / "docs/results/cuda-h100.json").read_text(encoding="utf-8"))["timings"]["each"]
    text = cuda_timings.PAGE.read_text(encoding="utf-8")

    assert rows
    assert cuda_timings.page(text, rows) == text


@pytest.mark.parametrize(
    ("stage", "M", "us", "fraction", "kept"),
    [
        ("router + align", 1024, 10.0, None, True),
        ("router + align", 1, 10.01, None, False),
        ("router + align", 4096, 16.0, None, None),
        ("combine", 16384, 200.0, 0.85, True),
        ("quantise mxfp8", 16384, 50.0, 0.84, False),
        ("quantise mxfp8", 4096, 50.0, 0.1, None),
        ("act", 16384, 200.0, 0.1, None),
    ],
)
def test_targets(cuda_timings: ModuleType, stage: str, M: int, us: float, fraction: float | None, kept: bool | None) -> None:
    assert cuda_timings.target({"stage": stage, "M": M, "us": us, "fraction_of_copy": fraction}) is kept
