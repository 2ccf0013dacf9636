"""docs/ratios.md is what the results files say; no bound of a healthy candidate is broken, and none is 100 times too wide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeproof.harness.cases.quant_sample import QUANTISED
from moeproof.harness.reports.ratios import page
from moeproof.reference.contract.problem import LAYOUTS

DOCS = Path(__file__).parents[2] / "docs"
RECORDS = [json.loads((DOCS / f"results/quant_ratios_{name}.json").read_text(encoding="utf-8")) for name in ("cpu", "h100")]


def test_the_page_is_what_the_results_say() -> None:
    assert (DOCS / "ratios.md").read_text(encoding="utf-8") == page(RECORDS)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["device"])
def test_healthy_candidates_of_every_scheme_stay_inside(record: dict) -> None:  # type: ignore[type-arg]
    assert [(r["scheme"], r["layout"]) for r in record["rows"]] == [(s, layout) for s in QUANTISED for layout in LAYOUTS]
    for row in record["rows"]:
        assert not row["failures"] and set(row["outcomes"]) <= {"PASS", "VACUOUS"}, row["scheme"]
        assert max(max(sums.values()) for sums in row["sums"].values()) < 1


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: r["device"])
def test_no_bound_is_100_times_too_wide(record: dict) -> None:  # type: ignore[type-arg]
    """Of every scheme's sums that have a bound at all, some candidate in some layout comes within 1/100 of it."""
    for scheme in QUANTISED:
        rows = [row["sums"] for row in record["rows"] if row["scheme"] == scheme]
        nearest = max(ratio for sums in rows for by_tensor in sums.values() for ratio in by_tensor.values())
        assert nearest == 0 or nearest > 0.01, (scheme, nearest)
