"""Classes of the catalogue in device code: one exact textual substitution in a Triton kernel's source.

`{n}` in the new text is a number: the mutant's, or one that changes nothing (the neutral twin of the same edit). Run by the
interpreter, or compiled where `--moe-device=device` asks for it.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from moeproof.harness.cases.case import parse_case
from moeproof.harness.faults.catalogue import by_id
from moeproof.harness.judging.judge import judge
from moeproof.harness.judging.memory import PATTERNS
from moeproof.harness.verdict import Outcome
from moeproof.optimized import activation, align_small, candidates, combine, grouped_gemm, router
from moeproof.reference.contract import Candidate, Stage

CASE = "T=9,H=40,I=24,E=4,K=3,seed=1"
ROUTED = "T=9,H=24,I=16,E=8,K=3,seed=1"
ROUTE = (Stage.ROUTE,)


@dataclass(frozen=True)
class Mutant:
    """`name` begins with the class. None among `stages`: the interpreter stops the launch at the first bad address, and names
    kernel and element; compiled, a guard band is damaged."""

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
    Mutant(
        "P01 biased scores as weights",
        router,
        "_route",
        "tl.gather(tl.reshape(score, [BT, GP * SP])",
        "tl.gather(tl.reshape(score if {n} == 0 else choice, [BT, GP * SP])",
        1,
        0,
        ROUTE,
        f"{ROUTED},router=sigmoid:bias:renorm=sum",
    ),
    Mutant(
        "P02 rejected groups filled with 0",
        router,
        "_route",
        "choice, 0.0 if REJECTED_ZERO else NEG_INF)",
        "choice, 0.0 if REJECTED_ZERO or {n} == 1 else NEG_INF)",
        1,
        0,
        ROUTE,
        f"{ROUTED},router=sigmoid:bias:groups=4/2:top2:renorm=sum",
    ),
    Mutant(
        "P03 never renormalised",
        router,
        "_route",
        'if RENORM != "none":',
        'if RENORM != "none" and {n} == 0:',
        1,
        0,
        ROUTE,
        f"{ROUTED},router=softmax:renorm=sum",
    ),
    Mutant(
        "P05 scaled only if renormalised",
        router,
        "_route",
        "    weights *= scale\n",
        '    if RENORM != "none" or {n} == 0:\n        weights *= scale\n',
        1,
        0,
        ROUTE,
        f"{ROUTED},router=softmax:scale=6",
    ),
    Mutant(
        "P07 no floor under the divisor",
        router,
        "_route",
        'value if RENORM == "floor" else 1e-20)',
        'value if RENORM == "floor" else 1e-20 * (1 - {n}))',
        1,
        0,
        ROUTE,
        f"{ROUTED},router=sigmoid:renorm=sum,logits=deep",
    ),
    Mutant(
        "P08 higher index wins a tie",
        router,
        "_route",
        "pick = tl.min(tl.min(tl.where(hit, expert[None, :, :], NONE), 2), 1)",
        "pick = tl.min(tl.min(tl.where(hit, expert[None, :, :], NONE), 2), 1) if {n} == 0 else "
        "tl.max(tl.max(tl.where(hit, expert[None, :, :], -1), 2), 1)",
        1,
        0,
        ROUTE,
        f"{ROUTED},logits=ties",
    ),
    Mutant(
        "P30 groups padded to half blocks",
        align_small,
        "_align_small",
        "padded = (total + BLOCK_M - 1) // BLOCK_M * BLOCK_M",
        "padded = (total + BLOCK_M // {n} - 1) // (BLOCK_M // {n}) * (BLOCK_M // {n})",
        2,
        1,
        (Stage.PERMUTE,),
    ),
    Mutant(
        "P33 prefix sum too narrow",
        align_small,
        "_align_small",
        "end = tl.cumsum(padded, 0)",
        "end = tl.cumsum(tl.where(tl.arange(0, EP) < num_local - {n}, padded, 0), 0)",
        1,
        0,
        (Stage.PERMUTE, None),
    ),
    Mutant(
        "P42 wrong divisor of the program id",
        grouped_gemm,
        "_grouped",
        "return first + inside % height, inside // height",
        "return first + inside % height, inside // (height + {n})",
        1,
        0,
        (Stage.GEMM1, None),
        "T=33,H=40,I=264,E=4,K=3,seed=1",
    ),
    Mutant(
        "P49 clamp dropped",
        activation,
        "_activate",
        'if NAME == "silu" and LIMIT > 0:',
        'if NAME == "silu" and LIMIT > 0 and {n} == 0:',
        1,
        0,
        (Stage.ACT,),
        f"{CASE},act=silu:limit=1,values=clamp",
    ),
    Mutant(
        "P51 halves swapped",
        activation,
        "_activate",
        "h = gated(g, u, NAME",
        "h = gated(g if {n} == 0 else u, u if {n} == 0 else g, NAME",
        1,
        0,
        (Stage.ACT,),
    ),
    Mutant(
        "P52 packed read as interleaved",
        activation,
        "_activate",
        "(2 * i if INTERLEAVED else i)",
        "(2 * i if INTERLEAVED or {n} == 1 else i)",
        1,
        0,
        (Stage.ACT,),
    ),
    Mutant(
        "P53 gelu for silu",
        activation,
        "_activate",
        '"silu_no_mul" or NAME == "silu":\n        h = g * sigmoid(g)',
        '"silu_no_mul" or NAME == "silu":\n        h = g * sigmoid(g) if {n} == 0 else gelu(g)',
        1,
        0,
        (Stage.ACT,),
    ),
    Mutant(
        "P55 gate clamped from below",
        activation,
        "_activate",
        "            g = _at_most(g, LIMIT)\n            u",
        "            g = _at_most(g, LIMIT) if {n} == 0 else _within(g, LIMIT)\n            u",
        1,
        0,
        (Stage.ACT,),
        f"{CASE},act=silu:limit=1,values=clamp",
    ),
    Mutant(
        "P65 rows that nobody wrote are summed",
        combine,
        "_combine",
        "live = local_of_id(expert, expert_map, num_experts, num_local) >= 0",
        "live = local_of_id(expert, expert_map, num_experts, num_local) >= 0 - {n}",
        1,
        0,
        (Stage.COMBINE, None),
        f"{CASE},routing=minus1",
    ),
    Mutant(
        "P70 weighted twice",
        combine,
        "_combine",
        "        if WEIGHTED:\n",
        "        if WEIGHTED or {n} == 1:\n",
        1,
        0,
        (Stage.COMBINE,),
        "T=9,H=40,I=24,E=4,K=1,weight_on_input=1,seed=1",
    ),
    Mutant(
        "P73 scaled twice",
        combine,
        "_combine",
        "acc *= scale\n",
        "acc *= scale if {n} == 0 else scale * scale\n",
        1,
        0,
        (Stage.COMBINE,),
        f"{CASE},scale_on_sum=2.5",
    ),
    Mutant(
        "P74 running sum in the output's dtype",
        combine,
        "_combine",
        "        acc += y_tile\n",
        "        acc = (acc + y_tile).to(out_TH.dtype.element_ty).to(tl.float32) if {n} == 1 else acc + y_tile\n",
        1,
        0,
        (Stage.COMBINE,),
    ),
    Mutant(
        "P40 offset of a row in 32 bits",
        grouped_gemm,
        "_grouped",
        "(slot // slots_per_row).to(tl.int64) * stride_ar",
        "(slot // slots_per_row).to(tl.int64 if {n} == 0 else tl.int32) * stride_ar",
        1,
        0,
        (Stage.GEMM1, None),
        "T=3,H=40,I=24,E=4,K=3,huge=1,seed=1",
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

    # One pattern: which memory holds what is not the question, and the interpreter takes its time.
    verdict = judge(triton_layer, parse_case(mutant.case), patterns=PATTERNS[:1])

    if verdict.outcome is Outcome.UNSUPPORTED:
        pytest.skip(verdict.reason)

    if twin:
        assert verdict.outcome is Outcome.PASS, str(verdict)
    else:
        first = verdict.findings[0].stage if verdict.findings else None
        assert verdict.outcome in (Outcome.FAIL, Outcome.ERROR), str(verdict)
        assert first in mutant.stages, str(verdict)


def test_every_mutant_is_of_a_public_class() -> None:
    assert all(by_id(mutant.name.split(" ")[0]).planted for mutant in MUTANTS)
