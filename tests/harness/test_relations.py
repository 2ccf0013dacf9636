"""Metamorphic relations, history and aliases: each sees the fault it is there for, and nothing in a healthy candidate."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import pipeline
import pytest
import torch

from moeproof.harness.cases.case import HISTORIES, RELATIONS, parse_case
from moeproof.harness.cases.inputs import make_inputs
from moeproof.harness.judging.history import cannot_remember
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.memory import overlap
from moeproof.harness.registry import load_candidates
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Claims, ContractError, Inputs

Tensor = torch.Tensor
LAYER = "T=17,H=40,I=24,E=5,K=2"
BATCH = Claims(deterministic="batch")


def right(i: Inputs) -> Tensor:
    return pipeline.Pipeline()(i)["out"]


def nudged(i: Inputs, rows: slice | Tensor) -> Tensor:
    """Within every bound of fp32, another result for some rows."""
    out = right(i)
    out[rows] = torch.nextafter(out[rows], out[rows] * 2)
    return out


def by_position(i: Inputs) -> Tensor:
    return nudged(i, slice(0, 1))


def by_batch(i: Inputs) -> Tensor:
    """Another tile, and with it another order of sums, from 20 tokens on: a split batch, or a doubled one."""
    return nudged(i, slice(None)) if i.problem.T != 17 else right(i)


def clipped_weights(i: Inputs) -> Tensor:
    return right(i.map({"topk_weights": i.topk_weights.clamp(max=1.2)}))


BROKEN: tuple[tuple[str, Callable[[Inputs], Tensor], Claims], ...] = (
    ("permute", by_position, BATCH),
    ("duplicate", by_batch, BATCH),
    ("split", by_batch, BATCH),
    ("double", clipped_weights, Claims()),
)


@pytest.mark.parametrize("relation", [r for r in RELATIONS if r not in ("none", "ranks")])
@pytest.mark.parametrize("extra", ["", ",dtype=fp32", ",routing=minus1,expert_bias=1", ",router=softmax:zero_experts=2"])
def test_a_healthy_candidate_keeps_every_relation(relation: str, extra: str) -> None:
    beyond_the_plain_pipeline = "bias" in extra or "zero_experts" in extra
    candidate = _installed("eager-stages") if beyond_the_plain_pipeline else Candidate("right", right)
    verdict = judge(candidate, parse_case(f"{LAYER}{extra},relation={relation},seed=3"), "cpu")

    assert verdict.outcome is Outcome.PASS, verdict


@pytest.mark.parametrize("scheme", ["fp8_token", "int4_w4a16_zp_g32", "mxfp4_w4a4", "nvfp4", "nvfp4_encode"])
def test_relabelled_experts_take_their_scales_along(scheme: str) -> None:
    """Scales, zero points and global scales belong to experts as their codes do."""
    line = f"T=17,H=128,I=64,E=5,K=2,scheme={scheme},relation=relabel,values=groups,seed=3"

    assert judge(_installed("eager"), parse_case(line), "cpu").outcome is Outcome.PASS


def test_a_split_batch_has_another_scale_where_all_tokens_share_one() -> None:
    with pytest.raises(ContractError, match="relation=split: scheme fp8_tensor has one scale for all tokens"):
        parse_case("T=8,H=64,I=64,E=3,K=2,scheme=fp8_tensor,relation=split")
    assert parse_case("T=8,H=64,I=64,E=3,K=2,scheme=fp8_tensor_static,relation=split").relation == "split"


def test_relabelled_experts_move_between_ranks_that_have_one_scale_each() -> None:
    with pytest.raises(ContractError, match="relation=relabel: scheme fp8_tensor has one scale for all that a rank computes"):
        parse_case("T=8,H=64,I=64,E=4,K=2,scheme=fp8_tensor,ranks=2,relation=relabel")
    assert parse_case("T=8,H=64,I=64,E=4,K=2,scheme=fp8_tensor,relation=relabel").ranks == 1


def _installed(name: str) -> Candidate:
    return load_candidates([name])[0]


@pytest.mark.parametrize(("relation", "run", "claims"), BROKEN, ids=[f"{r}-{f.__name__}" for r, f, _ in BROKEN])
def test_a_relation_sees_what_no_bound_sees(relation: str, run: Callable[[Inputs], Tensor], claims: Claims) -> None:
    case = parse_case(f"{LAYER},dtype=fp32,seed=3")
    plain = judge(Candidate("near", run, claims=claims), case, "cpu")
    verdict = judge(Candidate("near", run, claims=claims), replace(case, relation=relation), "cpu")

    assert plain.outcome is Outcome.PASS, plain
    assert verdict.outcome is Outcome.FAIL, verdict
    assert f"relation {relation} is broken" in str(verdict)


@pytest.mark.parametrize("relation", ["relabel", "flip"])
def test_relations_within_bounds_see_what_depends_on_a_number(relation: str) -> None:
    """Faults that the oracle sees as well are planted behind a condition that only the changed call meets."""

    def by_number(i: Inputs) -> Tensor:
        same = torch.equal(i.topk_ids, make_inputs(parse_case(f"{LAYER},seed=3")).topk_ids)
        return right(i) if same else (right(i) * 1.05).to(i.hidden_states.dtype)

    verdict = judge(Candidate("by_number", by_number), parse_case(f"{LAYER},relation={relation},seed=3"), "cpu")

    assert verdict.outcome is Outcome.FAIL, verdict
    assert f"relation {relation} is broken" in str(verdict)


def test_another_case_in_between_must_not_show() -> None:
    kept: dict[tuple[int, ...], Tensor] = {}

    def caches_weights(i: Inputs) -> Tensor:
        """Prepared once for each shape: the next layer with these shapes gets this one's weights."""
        w1 = kept.setdefault(tuple(i.w1.shape), i.w1.clone())
        return right(i.map({"w1": w1}))

    alone = parse_case(f"{LAYER},seed=3")
    assert judge(Candidate("caches", caches_weights), alone, "cpu").outcome is Outcome.PASS

    uses = []

    def keeps_sum(i: Inputs) -> Tensor:
        """The accumulator is cleared only where the batch is longer than the last one."""
        uses.append(i.problem.T)
        return right(i) + (1.0 if len(uses) > 1 and uses[-2] > i.problem.T else 0.0)

    verdict = judge(Candidate("keeps", keeps_sum), parse_case(f"{LAYER},history=interleave,seed=3"), "cpu")
    assert verdict.outcome is Outcome.FAIL, verdict
    assert "once other cases have run in between" in str(verdict)

    healthy = judge(Candidate("right", right), parse_case(f"{LAYER},history=interleave,seed=3"), "cpu")
    assert healthy.outcome is Outcome.PASS, healthy


def test_ids_that_only_the_case_in_between_has_may_be_refused_there() -> None:
    """routing=beyond names ids that no expert has, by chance: with one token perhaps only for other seeds."""
    line = "T=1,H=40,I=24,E=5,K=2,routing=beyond,history=interleave,seed={}"
    seeds = [n for n in range(40) if int(make_inputs(parse_case(line.format(n))).topk_ids.max()) < 5]
    other = [n for n in seeds if int(make_inputs(parse_case(line.format(n + 1))).topk_ids.max()) >= 5]

    assert other, "some seed has no such id where the next one has"
    assert judge(_installed("eager"), parse_case(line.format(other[0])), "cpu").outcome is Outcome.PASS


@pytest.mark.parametrize("history", [h for h in HISTORIES if h not in ("none", "interleave")])
def test_what_needs_a_gpu_says_so(history: str) -> None:
    verdict = judge(Candidate("right", right), parse_case(f"{LAYER},history={history}"), "cpu")

    assert verdict.outcome is Outcome.UNSUPPORTED
    assert "needs an NVIDIA GPU" in verdict.reason


def test_far_offsets_run_in_plain_torch_and_say_where_they_cannot() -> None:
    case = parse_case("T=3,H=16,I=8,E=3,K=2,huge=1,seed=1")
    x = make_inputs(case).hidden_states

    assert (x.shape[0] - 1) * x.stride(0) >= 2**31
    assert judge(Candidate("right", right), case, "cpu").outcome is (
        Outcome.PASS if sys.platform != "win32" else Outcome.UNSUPPORTED
    )
    assert "needs an NVIDIA GPU" in str(cannot_remember(case, "cpu", "triton"))


@pytest.mark.skipif(sys.platform == "win32", reason="an address space of 60 GB counts as memory there")
def test_damage_to_far_rows_is_seen() -> None:
    def damages(inputs: Inputs) -> torch.Tensor:
        out = right(inputs)
        inputs.hidden_states[2, 3] += 1
        return out

    verdict = judge(Candidate("damages", damages), parse_case("T=3,H=16,I=8,E=3,K=2,huge=1,seed=1"), "cpu")
    assert "hidden_states was modified" in verdict.findings[0].message


def test_an_output_that_shares_memory_is_found() -> None:
    def borrows(i: Inputs) -> Tensor:
        return i.hidden_states

    def shows_its_own(i: Inputs) -> dict[str, Tensor]:
        buffer = torch.empty(17 * 2 * 40, dtype=torch.bfloat16)
        shown = pipeline.Pipeline()(i)
        return {"y": buffer.view(17, 2, 40).copy_(shown["y"]), "out": buffer.view(17, 2, 40)[:, 0].copy_(shown["out"])}

    case = parse_case(f"{LAYER},seed=3")
    assert "COMBINE out: shares memory with hidden_states" in str(judge(Candidate("borrows", borrows), case, "cpu"))
    assert "COMBINE out: shares memory with y" in str(judge(Candidate("own", shows_its_own), case, "cpu"))


def test_spans_meet_or_not() -> None:
    x = torch.zeros(10, 4)
    assert overlap(x[:5], x[4:])
    assert overlap(x[:, 0], x[:, 1])
    assert not overlap(x[:5], x[5:])
    assert not overlap(x, torch.zeros(4))
    assert not overlap(x[:0], x)


def test_ids_that_no_expert_has_are_refused_or_ignored() -> None:
    case = parse_case(f"{LAYER},routing=beyond,seed=3")

    def ignores(i: Inputs) -> Tensor:
        return right(i.map({"topk_ids": torch.where(i.topk_ids < 5, i.topk_ids, -1)}))

    def wraps(i: Inputs) -> Tensor:
        return right(i.map({"topk_ids": i.topk_ids % 5, "topk_weights": i.topk_weights.nan_to_num(1.0)}))

    assert judge(Candidate("ignores", ignores), case, "cpu").outcome is Outcome.PASS
    assert judge(Candidate("wraps", wraps), case, "cpu").outcome is Outcome.FAIL
    assert "refuses ids >= E" in judge(_installed("eager"), case, "cpu").reason


def test_workspaces_that_share_memory_are_found() -> None:
    """A kernel that gives the second product its own input to write into."""
    from moeproof.harness.judging.pairs import SharedMemory, _check_apart

    x, buffer = torch.zeros(4, 8), torch.zeros(64)
    rest = (*(None,) * 9,)
    arguments = (x, x.new_zeros(2, 8, 8), x.new_zeros(2, 8, 4), torch.zeros(4, 1), *rest, buffer[:32], buffer[32:], None)
    _check_apart(arguments)

    with pytest.raises(SharedMemory, match="workspace13 and workspace2 of apply share memory"):
        _check_apart((*arguments[:13], buffer[:40], buffer[32:], None))
    with pytest.raises(SharedMemory, match="hidden_states and workspace2 of apply"):
        _check_apart((buffer[:8], *arguments[1:13], buffer[32:], buffer[:4], None))
