"""Whatever a candidate does, there is one clear verdict and no traceback from us."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.pipeline import Pipeline
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract import Candidate, Claims, ContractError, Inputs

Tensor = torch.Tensor
CASE = parse_case("T=9,H=40,I=24,E=4,K=2,routing=minus1,seed=1")
FP32 = parse_case("T=9,H=40,I=24,E=4,K=2,dtype=fp32,seed=1")


def right(inputs: Inputs) -> Tensor:
    return Pipeline()(inputs)["out"]


def raises(inputs: Inputs) -> Tensor:
    raise RuntimeError("CUDA error: something\nand a long tail")


def refuses(inputs: Inputs) -> Tensor:
    raise ContractError("hidden size 40 is not a multiple of 64")


def returns_none(inputs: Inputs) -> None:
    return None


def writes_input(inputs: Inputs) -> Tensor:
    out = right(inputs)
    inputs.w2[1, 3, 5] += 1
    return out


def writes_ids(inputs: Inputs) -> Tensor:
    out = right(inputs)
    inputs.topk_ids.clamp_(min=0)
    return out


def writes_past_input(inputs: Inputs) -> Tensor:
    out = right(inputs)
    x = inputs.hidden_states
    x.as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(0)
    return out


def writes_before_own_buffer(inputs: Inputs) -> Tensor:
    out = torch.empty_like(inputs.hidden_states)
    out.as_strided((1,), (1,), out.storage_offset() - 1).fill_(0)
    return out.copy_(right(inputs))


def leaves_dead_rows(inputs: Inputs) -> Tensor:
    out = torch.empty_like(inputs.hidden_states)
    live = (inputs.topk_ids >= 0).any(dim=1)
    out[live] = right(inputs)[live]
    return out


def reads_unwritten(inputs: Inputs) -> Tensor:
    """Within every bound, yet decided by what a buffer held: only the poison patterns can tell."""
    out = right(inputs)
    scratch = torch.empty(1, dtype=torch.int32)
    return torch.nextafter(out, out * 2) if int(scratch[0]) < 0 else out


BAD: tuple[tuple[Callable[[Inputs], object], Outcome, str], ...] = (
    (raises, Outcome.ERROR, "raised RuntimeError: CUDA error: something"),
    (refuses, Outcome.ERROR, "refused its arguments: hidden size 40 is not a multiple of 64"),
    (returns_none, Outcome.FAIL, "returned NoneType, must be a tensor or a mapping"),
    (lambda i: {}, Outcome.FAIL, "returned dict, must be a tensor or a mapping"),
    (lambda i: {"result": right(i)}, Outcome.FAIL, "is no canonical tensor; allowed: topk_ids"),
    (lambda i: {"out": 3}, Outcome.FAIL, "is a int, must be a tensor"),
    (lambda i: right(i)[:, :-1], Outcome.FAIL, "has shape (9, 39), must be (9, 40)"),
    (lambda i: right(i).float(), Outcome.FAIL, "is torch.float32, must be torch.bfloat16"),
    (lambda i: right(i).to("meta"), Outcome.FAIL, "is on meta, must be on cpu"),
    (lambda i: {"topk_ids": i.topk_ids, "out": right(i)}, Outcome.FAIL, "only be judged together with topk_weights"),
    (lambda i: right(i) * float("nan"), Outcome.FAIL, "not a number"),
    (lambda i: torch.zeros_like(right(i)), Outcome.FAIL, "wrong value"),
    (writes_input, Outcome.FAIL, "w2 was modified at byte"),
    (writes_ids, Outcome.FAIL, "topk_ids was modified at byte"),
    (writes_past_input, Outcome.FAIL, "written 0 bytes past the end of hidden_states"),
    (writes_before_own_buffer, Outcome.FAIL, "bytes before the start of a buffer that the candidate allocated"),
    (leaves_dead_rows, Outcome.FAIL, "not a number"),
)


@pytest.mark.parametrize(("run", "outcome", "words"), BAD, ids=[w[:40] for _, _, w in BAD])
def test_a_bad_candidate_gets_one_clear_verdict(run: Callable[[Inputs], object], outcome: Outcome, words: str) -> None:
    verdict = judge(Candidate("bad", run), CASE, "cpu")  # type: ignore[arg-type]

    assert verdict.outcome is outcome, verdict
    assert words in str(verdict)
    assert 'moeproof replay "T=9,' in str(verdict)


def test_a_right_one_passes() -> None:
    assert judge(Candidate("right", right), CASE, "cpu").outcome is Outcome.PASS


def test_a_result_that_depends_on_unwritten_memory_fails() -> None:
    verdict = judge(Candidate("reader", reads_unwritten), FP32, "cpu")

    assert verdict.outcome is Outcome.FAIL
    assert "depends on what unwritten memory held (nan against ff against big)" in str(verdict)


def test_flaky_is_another_verdict_than_wrong() -> None:
    calls = []

    def flaky(inputs: Inputs) -> Tensor:
        calls.append(1)
        out = right(inputs)
        return torch.nextafter(out, out * 2) if len(calls) % 2 else out

    verdict = judge(Candidate("flaky", flaky), FP32, "cpu")
    assert verdict.outcome is Outcome.FLAKY, verdict

    claimed = Candidate("flaky", flaky, claims=Claims(deterministic="none"))
    assert judge(claimed, FP32, "cpu").outcome is Outcome.PASS


def test_what_is_not_supported_says_why() -> None:
    never = Candidate("never", right, supports=lambda p: "built for H=7168 only")
    verdict = judge(never, CASE, "cpu")

    assert verdict.outcome is Outcome.UNSUPPORTED
    assert verdict.reason == "built for H=7168 only"


def test_inplace_must_return_the_input_itself() -> None:
    case = parse_case("T=9,H=40,I=24,E=4,K=2,inplace=1,seed=1")
    assert "must be hidden_states itself" in str(judge(Candidate("copy", lambda i: right(i).clone()), case, "cpu"))

    assert judge(Candidate("in_place", right), case, "cpu").outcome is Outcome.PASS


def test_a_case_that_cannot_tell_is_vacuous() -> None:
    """bf16 partial sums over many terms allow more than the result: such a rule proves nothing."""
    loose = Candidate("loose", right, claims=Claims(accumulate="dtype"))
    case = parse_case("T=2,H=1536,I=8,E=2,K=2,seed=1")
    verdict = judge(
        Candidate("loose", lambda i: {"gate_up": Pipeline()(i)["gate_up"], "out": right(i)}, claims=loose.claims), case, "cpu"
    )

    assert verdict.outcome is Outcome.VACUOUS, verdict
    assert "would pass for zeros" in verdict.reason


def test_the_usual_signature_is_enough() -> None:
    def my_moe(hidden_states: Tensor, w1: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        inputs = Inputs(CASE.problem, hidden_states, topk_ids, topk_weights, w1, w2, logits=torch.zeros(9, 4))
        return right(inputs)

    verdict = judge(my_moe, CASE, "cpu")
    assert (verdict.outcome, verdict.candidate) == (Outcome.PASS, "my_moe")
    gelu = parse_case("T=9,H=40,I=24,E=4,K=2,act=gelu")
    assert judge(my_moe, gelu, "cpu").outcome is Outcome.UNSUPPORTED
