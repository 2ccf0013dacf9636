"""The CI matrix: every cell ends in a state, with a reason where it is not PASS."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from moeproof import Candidate, Claims, ContractError, Inputs, Problem
from moeproof.harness.cases.presets import PRESETS
from moeproof.harness.reports import matrix
from moeproof.harness.reports.matrix import Block, Cell, CellResult, Config, State
from moeproof.reference.oracle import chain

CONFIG = Path(__file__).parents[2] / "ci" / "matrix.json"
SMALL = Config(
    (Block(presets=("mixtral-8x7b", "kimi-k3"), layouts=("standard",)), Block(("mixtral-8x7b",), ("fp32",))), tokens=2
)


def _right(inputs: Inputs) -> Mapping[str, torch.Tensor]:
    return {"out": chain(inputs, Claims())["out"].value.to(inputs.problem.fmt.dtype)}


def _wrong(inputs: Inputs) -> torch.Tensor:
    return -_right(inputs)["out"]


def _raises(inputs: Inputs) -> torch.Tensor:
    raise RuntimeError("out of luck")


def _standard(problem: Problem) -> str | None:
    if problem.latent:
        return "no latent layers"
    return None if problem.layout == "standard" else "standard layout only"


CANDIDATES = (
    Candidate("right", _right, supports=_standard),
    Candidate("wrong", _wrong, supports=_standard),
    Candidate("raises", _raises, supports=_standard),
    Candidate("gpu-only", _right, backend="cuda"),
)


@pytest.fixture(scope="module")
def results() -> list[CellResult]:
    return matrix.run(matrix.cells(SMALL, CANDIDATES), CANDIDATES, "interpret", tokens=SMALL.tokens)


def _of(results: list[CellResult], name: str) -> dict[str, CellResult]:
    return {str(r.cell).partition(" ")[2]: r for r in results if r.cell.candidate == name}


def test_cells_are_the_product_of_each_block_once() -> None:
    found = matrix.cells(Config((Block(("mixtral-8x7b",)), Block(("mixtral-8x7b",), ("bf16", "fp16")))), CANDIDATES)

    assert len(found) == len(set(found)) == 2 * 2 * 2 * len(CANDIDATES)
    assert {c.mode for c in found} == {"interpret", "device"}


def test_the_committed_matrix_names_every_preset() -> None:
    found = matrix.cells(matrix.read_config(CONFIG), CANDIDATES)

    assert {c.preset for c in found} == set(PRESETS)
    assert {c.dtype for c in found} == {"bf16", "fp16", "fp32"}
    assert {c.layout for c in found} == {"standard", "batched"}


def test_every_cell_has_a_state_and_a_reason(results: list[CellResult]) -> None:
    right = _of(results, "right")

    assert len(results) == len(matrix.cells(SMALL, CANDIDATES))
    assert right["mixtral-8x7b bf16 standard interpret"].state is State.PASS
    assert right["mixtral-8x7b fp32 batched interpret"].reason == "standard layout only"
    assert right["kimi-k3 bf16 standard interpret"].reason == "no latent layers"
    assert right["mixtral-8x7b bf16 standard device"].state is State.NOT_RUN
    assert _of(results, "wrong")["mixtral-8x7b fp32 standard interpret"].state is State.FAIL
    assert _of(results, "raises")["mixtral-8x7b bf16 standard interpret"].reason == (
        "ERROR: the candidate raised RuntimeError: out of luck"
    )
    assert {r.state for r in _of(results, "gpu-only").values()} == {State.NOT_RUN}


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_the_reason_says_so(results: list[CellResult]) -> None:
    reasons = {r.reason for r in results if r.cell.mode == "device"}
    full = matrix.run(matrix.cells(SMALL, CANDIDATES), CANDIDATES, "interpret", full_size=True)

    assert reasons == {"this machine has no NVIDIA GPU"}
    assert {r.state for r in full} == {State.NOT_RUN}
    assert "layers of full size need an NVIDIA GPU" in {r.reason for r in full}


def test_past_the_time_limit_nothing_begins() -> None:
    found = matrix.run(matrix.cells(SMALL, CANDIDATES), CANDIDATES, "interpret", tokens=2, time_limit_s=-1.0)
    late = [r for r in found if "time limit" in r.reason]

    assert {r.state for r in found} == {State.NOT_RUN, State.UNSUPPORTED}
    assert len(late) == 2 * 3


def test_results_cannot_lie() -> None:
    cell = Cell("right", "mixtral-8x7b", "bf16", "standard", "interpret")

    with pytest.raises(ValueError, match="needs a reason"):
        CellResult(cell, State.NOT_RUN)
    with pytest.raises(ValueError, match="needs a verdict"):
        CellResult(cell, State.PASS)


def test_exit_codes(results: list[CellResult]) -> None:
    passed = [r for r in results if r.state is not State.FAIL]

    assert matrix.exit_code(results) == 1
    assert matrix.exit_code(passed) == 0
    assert matrix.exit_code([r for r in passed if r.state is not State.PASS]) == 3


def test_the_table_and_the_reasons_show_what_happened(results: list[CellResult]) -> None:
    out = io.StringIO()
    Console(width=160, file=out).print(matrix.render(results))
    lines = matrix.reasons(results)

    assert "2 PASS 1u 3n" in out.getvalue()
    assert "2 FAIL (bf16 standard, fp32 standard)" in out.getvalue()
    assert any("moeproof replay" in line for line in lines)
    assert "1 UNSUPPORTED right: no latent layers" in lines


def test_records_are_json(results: list[CellResult]) -> None:
    for result in results:
        record = json.loads(json.dumps(matrix.as_dict(result)))
        assert record["state"] == result.state.value
    total = matrix.summary(results, 1.0)

    assert total["cells"] == len(results)
    assert (total["pass"], total["fail"]) == (2, 4)
    assert sum(int(str(total[k])) for k in ("pass", "fail", "unsupported", "not_run")) == len(results)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "the file is list, must be an object"),
        ('{"matrix": {"blocks": []}}', "the matrix has no block"),
        ('{"matrix": {"colour": 1}}', "key of matrix 'colour' is not known"),
        ('{"matrix": {"blocks": [{"presets": ["gpt-7"]}]}}', "preset 'gpt-7' is not known"),
        ('{"matrix": {"blocks": [{"dtypes": ["fp12"]}]}}', "dtype 'fp12' is not known; allowed: bf16, fp16, fp32"),
        ('{"matrix": {"blocks": [{"dtypes": []}]}}', "empty list of dtypes"),
        ('{"matrix": {"blocks": [{"modes": "device"}]}}', "modes must be a list of names"),
        ('{"matrix": {"tokens": "many"}}', "tokens is 'many', must be a whole number"),
        ('{"matrix": {"time_limit_s": 0}}', "time_limit_s=0 must be positive"),
    ],
)
def test_a_bad_file_is_refused_with_one_message(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "matrix.json"
    path.write_text(text)

    with pytest.raises(ContractError) as error:
        matrix.read_config(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_and_an_unknown_candidate_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match="does not exist; give one with --config"):
        matrix.read_config(tmp_path / "none.json")
    with pytest.raises(ContractError, match="candidate of the matrix 'mine' is not known; allowed: right, wrong"):
        matrix.cells(Config(candidates=("mine",)), CANDIDATES)
