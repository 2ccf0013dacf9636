"""Healthy candidates of every scheme in both layouts: no alarm; the exact probe bit for bit through the whole pipeline.

The campaign is a command, `moeproof ratios` (docs/results); this is its sample.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.cases.inputs import digest, make_inputs
from moeproof.harness.cases.quant_sample import QUANTISED, draw_quantised
from moeproof.harness.faults.quant_pipeline import QuantPipeline, quant_candidate
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.pairs import as_candidate
from moeproof.harness.reports.policies import policies
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import SCHEMES, Claims, ContractError, Inputs, Pair, Stage
from moeproof.reference.eager import BatchedPrepareAndFinalize, candidates
from moeproof.reference.eager.prepare_finalize import Prepared
from moeproof.reference.eager.quantise import Matrix
from moeproof.reference.oracle.quant_stages import quant1
from moeproof.reference.oracle.quant_stages import weight as dequantised
from moeproof.reference.oracle.quantise import reduce_groups

CANDIDATES = {c.name: c for c in candidates()}
SIZES = "T=7,H=128,I=128,E=3,K=2"


@pytest.mark.parametrize("scheme", QUANTISED)
@pytest.mark.parametrize("name", ["eager", "eager-batched"])
def test_random_case_passes(name: str, scheme: str) -> None:
    layout = "batched" if name == "eager-batched" else "standard"
    case = parse_case(f"{SIZES},scheme={scheme},layout={layout},values=groups,routing=minus1,seed={len(scheme)}")

    verdict = judge(CANDIDATES[name], case, "cpu")
    assert verdict.outcome is Outcome.PASS, verdict


@pytest.mark.parametrize("scheme", QUANTISED)
def test_exact_probe_is_exact_at_every_stage(scheme: str) -> None:
    """Every scale a power of two, and no stage with any error at all: the worst ratio of everything shown is 0."""
    case = parse_case(f"{SIZES},scheme={scheme},values=pin,routing=minus1,seed=4")
    inputs = make_inputs(case)
    verdict = judge(CANDIDATES["eager-stages"], case, "cpu")

    assert verdict.outcome is Outcome.PASS, verdict
    assert {n: r for n, r in verdict.worst.items() if n != "topk_ids" and r > 0} == {}
    for field in ("w1_scale", "w2_scale", "w1_global", "w2_global", "a1_scale", "a2_scale"):
        scale = getattr(inputs, field)
        if scale is not None and scale.dtype != torch.uint8:
            # 448 is the one block that sets the global scale of a two-level format; its row holds nothing else.
            values = scale.float()[scale.float() != 448.0]
            assert bool((torch.frexp(values).mantissa == 0.5).all()), field


LEAST = [s for s in QUANTISED if SCHEMES[s].w.scale == "e8m0" and (SCHEMES[s].a1 or SCHEMES[s].w).scale == "e8m0"]


@pytest.mark.parametrize("scheme", LEAST)
@pytest.mark.parametrize("name", ["eager-stages", "eager-batched"])
def test_the_least_scale_is_no_zero_and_exact_at_every_stage(name: str, scheme: str) -> None:
    """e8m0 code 0 in x, w1 and w2, under groups that hold something: 2^-127, a subnormal of float32."""
    layout = "batched" if name == "eager-batched" else "standard"
    case = parse_case(f"T=7,H=128,I=96,E=3,K=2,scheme={scheme},layout={layout},values=least,seed=3")
    inputs = make_inputs(case)
    verdict = judge(CANDIDATES[name], case, "cpu")

    assert verdict.outcome is Outcome.PASS, verdict
    assert {n: r for n, r in verdict.worst.items() if n != "topk_ids" and r > 0} == {}
    for weights in (dequantised(inputs, n, 0) for n in ("w1", "w2")):
        assert bool(((weights.s == 2.0**-127) & (reduce_groups(weights.q.abs(), weights.quantiser, "amax") > 0)).any())
    if inputs.problem.quant.a1 is not None:
        x = quant1(inputs)
        assert bool(((x.s == 2.0**-127) & (reduce_groups(x.q.abs(), x.quantiser, "amax") > 0)).any())


def test_the_probe_spreads_its_scales() -> None:
    """Tokens, channels and groups differ by powers of two over at least 8 binades, or nothing misplaced could show."""
    inputs = make_inputs(parse_case("T=33,H=256,I=256,E=3,K=2,scheme=mxfp8,values=pin,seed=1"))
    assert inputs.w1_scale is not None
    exponents = inputs.w1_scale.long()

    assert int(exponents.max() - exponents.min()) >= 8


@pytest.mark.parametrize("scheme", ["fp8_token", "mxfp4_w4a4", "nvfp4", "int4_w4a16_zp_g32"])
def test_strided_and_transposed_arguments(scheme: str) -> None:
    case = parse_case(f"{SIZES},scheme={scheme},values=groups,storage=KN,strided=1,seed=2")

    assert judge(CANDIDATES["eager"], case, "cpu").outcome is Outcome.PASS


def test_every_quantised_seed_draws_a_case_that_reads_back() -> None:
    drawn = [draw_quantised(seed) for seed in range(200)]

    assert all(parse_case(str(case)) == case for case in drawn)
    assert {c.problem.scheme for c in drawn} == set(QUANTISED)
    assert {c.values for c in drawn} == {"normal", "hetero", "groups", "edges", "ties", "pin", "int"}
    assert {c.relation for c in drawn} == {"none", "permute", "duplicate", "split", "relabel", "flip", "double"}
    assert 0.4 < sum(c.relation == "none" for c in drawn) / len(drawn) < 0.7


def test_inputs_of_a_rank_are_those_of_a_single_rank() -> None:
    whole = make_inputs(parse_case(f"{SIZES},scheme=nvfp4,seed=3"))
    part = make_inputs(parse_case(f"{SIZES},scheme=nvfp4,ep=3,ep_rank=1,seed=3"))

    for field in ("w1", "w1_scale", "w1_global", "a2_scale"):
        one, all_of = getattr(part, field), getattr(whole, field)
        assert torch.equal(one.contiguous().view(torch.uint8), all_of[1:2].contiguous().view(torch.uint8)), field


def test_unquantised_inputs_have_no_new_tensors() -> None:
    names = [name for name, _ in make_inputs(parse_case("T=4,H=16,I=16,E=3,K=2,seed=1")).tensors()]

    assert not [name for name in names if name.endswith(("_scale", "_zp", "_global"))]
    assert len(digest(make_inputs(parse_case("T=4,H=16,I=16,E=3,K=2,seed=1")))) == 64


class _ScalesStayBehind(BatchedPrepareAndFinalize):
    """P24: rows go to their experts, scales keep the source order."""

    def prepare(self, *args: object, **kwargs: object) -> Prepared:
        rows, scale, counts, ids, weights = super().prepare(*args, **kwargs)  # type: ignore[arg-type]
        assert scale is not None
        return rows, scale.flip(0), counts, ids, weights


@pytest.mark.parametrize("scheme", [n for n in QUANTISED if SCHEMES[n].a1 is not None and SCHEMES[n].a1.by_token])  # type: ignore[union-attr]
def test_scales_left_behind_in_dispatch_are_found_there(scheme: str) -> None:
    healthy = CANDIDATES["eager-batched"]
    assert isinstance(healthy, Pair)

    def make(inputs: Inputs) -> BatchedPrepareAndFinalize:
        return _ScalesStayBehind(inputs.problem.rows_per_expert, scheme=inputs.problem.quant)

    case = parse_case(f"{SIZES},scheme={scheme},layout=batched,values=groups,seed=9")
    verdict = judge(as_candidate(replace(healthy, name="left-behind", prepare_finalize=make)), case, "cpu")

    assert verdict.outcome is Outcome.FAIL
    assert str(verdict.findings[0].stage) == "DISPATCH", verdict


def test_a_probe_without_scheme_is_refused() -> None:
    with pytest.raises(ContractError, match="values=pin"):
        parse_case(f"{SIZES},values=pin,seed=1")
    assert isinstance(parse_case(f"{SIZES},scheme=mxfp8,values=pin,seed=1"), Case)


def test_policies_cover_every_scheme_dtype_and_stage() -> None:
    table = policies()
    quantised = {(p.scheme, p.stage) for p in table if p.stage.startswith("QUANT")}

    assert {p.scheme for p in table} == set(SCHEMES) and {p.dtype for p in table} == {"bf16", "fp16", "fp32"}
    assert quantised == {
        (name, stage) for name, s in SCHEMES.items() for stage, q in (("QUANT1", s.a1), ("QUANT2", s.a2)) if q is not None
    }
    assert all(p.formula and p.why and p.judged for p in table)


def test_policies_follow_the_claim() -> None:
    def gemm1(**claims: str) -> str:
        from moeproof.reference.contract import Claims

        return next(p.formula for p in policies("fp8_block", "bf16", Claims(**claims)) if p.stage == "GEMM1")

    assert (
        "K/16" in gemm1()
        and "sum_b y_b^2" in gemm1(accumulate="fp8_promoted")
        and "n = K/32" in gemm1(accumulate="fp8_unpromoted")
    )


class Lossy(QuantPipeline):
    """Sums of GEMM1 lose 2^-11 of themselves, toward zero: what cores of 13 fraction bits may do, and float32 may not."""

    def product(self, name: str, x: Matrix, w: Matrix) -> torch.Tensor:
        return super().product(name, x, w) * (1 - 2.0**-11 * (name == "gemm1"))


def test_what_a_problem_gets_may_claim_more_than_the_candidate_does_of_all() -> None:
    case = parse_case("T=7,H=256,I=128,E=3,K=2,scheme=fp8_token,seed=2")
    claimed = replace(quant_candidate(Lossy()), claims=Claims(accumulate="fp8_promoted"))
    refined = replace(claimed, claims_in=lambda problem: Claims())

    assert judge(claimed, case, "cpu").outcome is Outcome.PASS
    verdict = judge(refined, case, "cpu")
    assert verdict.outcome is Outcome.FAIL and verdict.findings[0].stage is Stage.GEMM1 and verdict.claims == "default"
    assert judge(refined, replace(case, relation="duplicate"), "cpu").outcome is Outcome.PASS, "twice the tokens: other kernels"
