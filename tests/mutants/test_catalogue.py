"""The catalogue, class by class: each planted fault fires, is caught and blamed on its stage; its twin is silent.

A sample of `moeproof faults --output docs`: the first variant of each class, on the case line (and, for its split, the
pipeline number) with which that command caught it, read from docs/results.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.cases.tiers import cases_of
from moeproof.harness.faults import ranks
from moeproof.harness.faults.catalogue import CATALOGUE, by_id
from moeproof.harness.faults.fault import Fault, plant
from moeproof.harness.faults.run import QUIET, ground_of, hunt_by_chance, judged
from moeproof.harness.verdict import Verdict
from moeproof.reference.contract import ContractError

RESULTS = json.loads((Path(__file__).parents[2] / "docs" / "results" / "faults-cpu.json").read_text(encoding="utf-8"))
CAUGHT_BY = {(h["id"], h["variant"]): h for h in RESULTS["hunts"]}
SURE = [(f, next(iter(f.variants))) for f in CATALOGUE if f.planted and not f.random and f.ground != "ranks"]
# By case, so that one oracle serves all that share it.
SURE.sort(key=lambda sure: CAUGHT_BY[sure[0].id, sure[1]]["at"])


def _judge(fault: Fault, variant: str, armed: bool) -> tuple[Verdict, int]:
    found = CAUGHT_BY[fault.id, variant]
    pipeline, thing = ground_of(fault, found["number"])
    witness = plant(pipeline, fault.variants[variant], armed)
    return judged(fault, pipeline, thing, parse_case(found["at"])), witness.fired


def test_every_public_class_has_a_row() -> None:
    assert [f.id for f in CATALOGUE] == [f"P{n:02d}" for n in range(1, 101)]
    assert len({f.name for f in CATALOGUE}) == 100
    for fault in CATALOGUE:
        assert fault.stands_for and fault.trigger and fault.blame
        assert fault.planted or fault.why_not


@pytest.mark.parametrize(("fault", "variant"), SURE, ids=lambda x: getattr(x, "id", str(x).replace(" ", "-") or "only"))
def test_a_planted_fault_is_caught_and_its_twin_is_silent(fault: Fault, variant: str) -> None:
    verdict, fired = _judge(fault, variant, armed=True)

    assert fired, "not triggered"
    assert verdict.outcome not in QUIET, verdict
    first = verdict.findings[0] if verdict.findings else None
    assert (first.stage if first else None) in fault.blame, verdict

    twin, fired = _judge(fault, variant, armed=False)
    assert fired, "the twin's faulty branch must run as well"
    assert twin.outcome in QUIET, twin


@pytest.mark.parametrize("fault", [f for f in CATALOGUE if f.random], ids=lambda f: f.id)
def test_a_fault_by_chance_is_caught_by_repeats(fault: Fault) -> None:
    hunt = hunt_by_chance(fault, "", 0.3, cases_of("quick"))

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


def test_an_unknown_class_is_refused() -> None:
    with pytest.raises(ContractError, match="fault class 'P101' is not known"):
        by_id("P101")


def test_a_step_that_does_not_exist_is_refused() -> None:
    pipeline, _ = ground_of(CATALOGUE[0], 0)
    with pytest.raises(AttributeError, match="no step 'routes'"):
        plant(pipeline, {"routes": lambda right, *_: right})
