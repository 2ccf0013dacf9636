"""The same classes in device code: one exact textual substitution in a kernel's source, run by the interpreter.

`{n}` in the new text is a number: the mutant's, or one that changes nothing (the neutral twin of the same edit).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.judging.judge import judge
from moeproof.harness.verdict import Outcome
from moeproof.optimized import activation, candidates, combine, grouped_gemm
from moeproof.reference.contract import Candidate, Stage

CASE = "T=9,H=40,I=24,E=4,K=3,seed=1"


@dataclass(frozen=True)
class Mutant:
    """None among `stages`: the interpreter stops the launch at the first bad address, and names kernel and element."""

    name: str
    module: ModuleType
    kernel: str
    old: str
    new: str
    n: int
    twin: int
    stages: tuple[Stage | None, ...]
    case: str = CASE


MUTANTS = (
    Mutant(
        "P38 last K tile lost",
        grouped_gemm,
        "_grouped",
        "for first in range(0, K, BLOCK_K):",
        "for first in range(0, K - {n}, BLOCK_K):",
        40,
        0,
        (Stage.GEMM1,),
    ),
    Mutant(
        "P39 store masked in M only",
        grouped_gemm,
        "_grouped",
        "tl.store(out, acc.to(out_SN.dtype.element_ty), mask=live[:, None] & (n < N)[None, :])",
        "tl.store(out, acc.to(out_SN.dtype.element_ty), mask=live[:, None] & (n < N + {n})[None, :])",
        8,
        0,
        (Stage.GEMM1, None),
    ),
    Mutant(
        "P46 padding rows stored",
        grouped_gemm,
        "_grouped",
        "    live = slot < num_slots\n",
        "    live = slot < num_slots + {n}\n",
        1,
        0,
        (None,),
    ),
    Mutant(
        "P63 block map one off",
        grouped_gemm,
        "_grouped",
        "expert = tl.load(block_expert + block).to(tl.int64)",
        "expert = tl.load(block_expert + (block + {n}) % num_m).to(tl.int64)",
        1,
        0,
        (Stage.GEMM1,),
    ),
    Mutant(
        "P31 divided twice",
        grouped_gemm,
        "_grouped",
        "(slot // slots_per_row).to(tl.int64)",
        "(slot // slots_per_row // {n}).to(tl.int64)",
        2,
        1,
        (Stage.GEMM1,),
    ),
    Mutant(
        "P54 width tail unwritten",
        activation,
        "_activate",
        "mask = live[:, None] & (i < num_columns)[None, :]",
        "mask = live[:, None] & (i < num_columns - {n})[None, :]",
        8,
        0,
        (Stage.ACT,),
    ),
    Mutant(
        "P66 hidden tail unwritten",
        combine,
        "_combine",
        "columns = (h < H)[None, :]",
        "columns = (h < H - {n})[None, :]",
        8,
        0,
        (Stage.COMBINE,),
    ),
    Mutant(
        "P67 weight of the neighbour slot",
        combine,
        "_combine",
        "at = weights_TK + t_wide * stride_wt + k * stride_wk",
        "at = weights_TK + t_wide * stride_wt + (k + {n}) % K * stride_wk",
        1,
        0,
        (Stage.COMBINE,),
    ),
    Mutant(
        "P68 last slot not summed",
        combine,
        "_combine",
        "for k in tl.static_range(K):",
        "for k in tl.static_range(K - {n}):",
        1,
        0,
        (Stage.COMBINE,),
    ),
    Mutant(
        "P90 reads dead slots' weights",
        combine,
        "_combine",
        "y_tile *= tl.load(at, mask=live, other=0.0).to(tl.float32)[:, None]",
        "y_tile *= tl.load(at, mask=live | (({n} > 0) & real), other=0.0).to(tl.float32)[:, None]",
        1,
        0,
        (Stage.COMBINE,),
        "T=9,H=40,I=24,E=4,K=3,routing=minus1,seed=1",
    ),
)


def _mutated(mutant: Mutant, n: int, folder: Path) -> ModuleType:
    """The module's text with the one substitution, imported from a file: Triton reads kernels from their source."""
    source = Path(str(mutant.module.__file__)).read_text(encoding="utf-8")
    assert source.count(mutant.old) == 1, "the substitution must be exact and unique"
    path = folder / f"mutated_{n}.py"
    path.write_text(source.replace(mutant.old, mutant.new.format(n=n)), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def triton_layer() -> Candidate:
    found = next(c for c in candidates.candidates() if c.name == "triton")
    assert isinstance(found, Candidate)
    return found


@pytest.mark.parametrize("twin", [False, True], ids=["mutant", "twin"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "-"))
def test_a_mutated_kernel(
    mutant: Mutant, twin: bool, triton_layer: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel, not the function that launches it: users may hold that by another name.
    wrong = getattr(_mutated(mutant, mutant.twin if twin else mutant.n, tmp_path), mutant.kernel)
    monkeypatch.setattr(mutant.module, mutant.kernel, wrong)

    verdict = judge(triton_layer, parse_case(mutant.case), "cpu")

    if twin:
        assert verdict.outcome is Outcome.PASS, str(verdict)
    else:
        assert verdict.outcome is Outcome.FAIL, str(verdict)
        assert verdict.findings[0].stage in mutant.stages, str(verdict)
