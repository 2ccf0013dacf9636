"""Healthy candidates on random cases: no alarm. The campaign of 1,000 is a command (docs/results); this is its sample."""

from __future__ import annotations

import pytest

from moeproof.harness.cases.case import LOGITS, ROUTINGS, Case, parse_case
from moeproof.harness.cases.sample import SAMPLED_VALUES, draw
from moeproof.harness.cases.tiers import TIERS, cases_of
from moeproof.harness.faults.fault import Fault
from moeproof.harness.faults.grounds import ground_of, judged, vacuous
from moeproof.harness.faults.healthy import healthy
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import find_candidates
from moeproof.harness.verdict import Outcome

CANDIDATES = {c.name: c for c in find_candidates()}
INTERPRETED = [c for c in CANDIDATES.values() if c.backend == "triton"]
PLAIN = [c for c in CANDIDATES.values() if c.backend == "torch"]


def test_our_own_candidates_are_found_through_the_entry_point() -> None:
    assert {"triton", "triton-modular", "triton-batched", "torch-grouped", "eager", "eager-batched"} <= set(CANDIDATES)


def _judge(name: str, case: Case) -> None:
    verdict = judge(CANDIDATES[name], case, "cpu")
    assert verdict.outcome in (Outcome.PASS, Outcome.UNSUPPORTED), verdict


@pytest.mark.parametrize("name", [c.name for c in PLAIN])
@pytest.mark.parametrize("start", range(0, 80, 20))
def test_torch_candidates_on_random_cases(name: str, start: int) -> None:
    for seed in range(start, start + 20):
        _judge(name, draw(seed))


@pytest.mark.parametrize("name", [c.name for c in INTERPRETED])
@pytest.mark.parametrize("seed", range(1000, 1008))
def test_interpreted_candidates_on_random_cases(name: str, seed: int) -> None:
    layout = "batched" if "batched" in name else "standard"
    _judge(name, draw(seed, layout=layout))


def test_every_seed_draws_a_case_that_reads_back() -> None:
    for seed in range(300):
        case = draw(seed)
        assert parse_case(str(case)) == case


def test_tiers_contain_each_other() -> None:
    quick, default, full = (cases_of(t) for t in ("quick", "default", "full"))
    assert full[: len(quick)] == quick
    assert len(full) > 200
    assert list(TIERS) == ["quick", "default", "full", "soak", "far", "sweep"]
    assert full[: len(default)] == default and default[: len(quick)] == quick


def test_the_sample_covers_every_recipe_and_feature() -> None:
    drawn = [draw(seed) for seed in range(1000)]
    for field, values in (("values", SAMPLED_VALUES), ("routing", ROUTINGS), ("logits", LOGITS)):
        assert {getattr(c, field) for c in drawn} == set(values)
    problems = [c.problem for c in drawn]
    assert len({p.act.name for p in problems}) == 12
    assert len({p.router.score for p in problems}) == 5
    for flag in ("expert_bias", "weight_on_input", "shared", "inplace"):
        assert any(getattr(p, flag) for p in problems), flag
    assert {p.layout for p in problems} == {"standard", "batched"}
    assert {p.T for p in problems} >= {0, 1, 16, 17, 33}


@pytest.mark.parametrize("kind", ["layer", "world", "tensor", "sequence", "replay"])
def test_the_pipelines_that_faults_are_planted_in_are_healthy(kind: str) -> None:
    blank = Fault("healthy", f"healthy.{kind}", "", "", (), {"": {}}, ground=kind)
    for number, case in enumerate(cases_of("quick")[:: 1 if kind in ("layer", "world") else 4]):
        pipeline, thing = ground_of(blank, number)
        verdict = judged(blank, pipeline, thing, case)
        assert verdict.outcome in (Outcome.PASS, Outcome.UNSUPPORTED), verdict


def test_the_healthy_campaign_of_the_faults_judges_every_ground() -> None:
    lines = ("T=9,H=40,I=24,E=4,K=2,seed=1", "T=9,H=128,I=96,E=3,K=2,scheme=mxfp8_up,values=groups,seed=41")
    found = healthy(enumerate(map(parse_case, lines), start=10))

    assert found.checks > 20 and not found.alarms and found.vacuous == 0


def test_no_case_of_the_default_tier_is_vacuous() -> None:
    assert not [str(case) for case in cases_of("default")[16:] if vacuous(case)]
