"""The catalogue, class by class: each planted fault fires, is caught and blamed on its stage; its twin passes, gate and all.

A sample of `moeproof faults --rules --output docs`: the first planting of each class, on the case line (and, for its split,
the pipeline number) with which that command caught it, read from docs/results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults import ranks
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.chance import hunt_by_chance
from moeproof.harness.faults.command import cases
from moeproof.harness.faults.fault import Fault, plant
from moeproof.harness.faults.grounds import QUIET, ground_of, judged, planted
from moeproof.harness.faults.hunt import Hunt
from moeproof.harness.faults.shrunk import shrunk
from moeproof.harness.verdict import Outcome, Verdict
from moeproof.reference.contract import ContractError

RESULTS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "faults-cpu.json").read_text(encoding="utf-8"))
CAUGHT_BY = {(h["id"], h["variant"], h["scheme"]): h for h in RESULTS["hunts"]}
SURE = [(f, *f.plantings[0]) for f in CATALOGUE if f.planted and not f.random and f.ground != "ranks"]
# By case, so that one oracle serves all that share it.
SURE.sort(key=lambda sure: CAUGHT_BY[sure[0].id, sure[1], sure[2]]["at"])


def _judge(fault: Fault, variant: str, scheme: str, armed: bool) -> tuple[Verdict, int]:
    found = CAUGHT_BY[fault.id, variant, scheme]
    pipeline, thing, witness = planted(fault, variant, found["number"], scheme, armed)
    return judged(fault, pipeline, thing, parse_case(found["at"])), witness.fired


def test_every_public_class_has_a_row() -> None:
    assert [f.id for f in CATALOGUE] == [f"P{n:02d}" for n in range(1, 101)]
    assert len({f.name for f in CATALOGUE}) == 100
    for fault in CATALOGUE:
        assert fault.stands_for and fault.trigger and fault.blame
        assert fault.planted or fault.why_not


@pytest.mark.parametrize(
    ("fault", "variant", "scheme"), SURE, ids=lambda x: getattr(x, "id", str(x).replace(" ", "-") or "only")
)
def test_a_planted_fault_is_caught_and_its_twin_passes(fault: Fault, variant: str, scheme: str) -> None:
    verdict, fired = _judge(fault, variant, scheme, armed=True)

    assert fired, "not triggered"
    assert verdict.outcome not in QUIET, verdict
    first = verdict.findings[0] if verdict.findings else None
    assert (first.stage if first else None) in fault.blame, verdict

    twin, fired = _judge(fault, variant, scheme, armed=False)
    assert fired, "the twin's faulty branch must run as well"
    assert twin.outcome is Outcome.PASS, twin


@pytest.mark.parametrize("fault", [f for f in CATALOGUE if f.random], ids=lambda f: f.id)
def test_a_fault_by_chance_is_caught_by_repeats(fault: Fault) -> None:
    hunt = hunt_by_chance(fault, "", 0.3, cases("default"))

    assert hunt.triggered and hunt.caught and hunt.right_stage, hunt
    assert not hunt.twin_alarms


@pytest.mark.parametrize("fault", [f for f in CATALOGUE if f.ground == "ranks"], ids=lambda f: f.id)
def test_a_hang_is_named_within_its_deadline(fault: Fault) -> None:
    worlds = [(8, 8, 8), (12, 0, 3)]
    for variant in fault.variants:
        fired, stuck = ranks.watch(fault.id, variant, True, worlds)

        assert fired and stuck is not None and stuck.index == 1
        assert stuck.finding.stage in fault.blame and stuck.finding.rank is not None
        assert "wait in collective" in stuck.finding.message


def test_healthy_ranks_come_to_their_end() -> None:
    fired, stuck = ranks.watch("P80", "", False, [(8, 8, 8), (12, 0, 3), (0, 0, 0)])

    assert fired and stuck is None


def test_the_committed_figures_are_what_is_promised() -> None:
    """docs/faults.md: every class planted, triggered, caught and blamed, shrunk in time, without an alarm.

    Time is the processor's, of two cores: the machine that the figures come from may have had other work as well.
    """
    summary, places, tier, small = (RESULTS[k] for k in ("summary", "plantings", "default_tier", "shrinking"))

    assert summary["planted"] == summary["triggered"] == summary["caught"] == len(CATALOGUE)
    assert summary["right_stage"] >= 0.95 * summary["caught"]
    assert places["right_place"] >= 0.9 * places["placed"]
    assert summary["twins_alarmed"] == summary["false_alarms"] == 0
    assert tier["caught"] >= 0.9 * tier["classes"] and tier["cpu_seconds"] < 2 * 300
    assert small["small_enough"] == small["classes"] == len(CATALOGUE) and small["median_cpu_seconds"] < 10
    assert {(h["id"], h["variant"], h["scheme"]) for h in RESULTS["hunts"]} == {
        (f.id, *planting) for f in CATALOGUE for planting in f.plantings
    }
    assert RESULTS["null_kernels"][0] == {"policy": "moeproof", "cases": RESULTS["null_kernels"][0]["cases"], "accepted": []}


@pytest.mark.parametrize("name", ["P11", "P67", "P77"])
def test_a_class_shrinks_to_a_few_tokens(name: str) -> None:
    fault = by_id(name)
    variant, scheme = fault.plantings[0]
    found = shrunk(fault, Hunt(**{k: v for k, v in CAUGHT_BY[name, variant, scheme].items() if k != "twin_alarms"}))

    assert found.complete and 0 <= found.tokens <= 4, found


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ContractError, match="fault class 'P101' is not known"):
        by_id("P101")


def test_a_step_that_does_not_exist_is_refused() -> None:
    pipeline, _ = ground_of(CATALOGUE[0], 0)
    with pytest.raises(AttributeError, match="no step 'routes'"):
        plant(pipeline, {"routes": lambda right, *_: right})
