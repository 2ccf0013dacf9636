"""Faults of quantised dispatch, planted on one rank: caught at their stage, with that rank named. Ids are docs/faults.md's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from rank_kit import PAIRS, Shown, expectation, line_for, simulate

from moeproof.harness.cases.case import parse_case
from moeproof.harness.ranks.checks import judge_world
from moeproof.harness.ranks.pairs import PREPARED
from moeproof.harness.verdict import Finding
from moeproof.reference.contract import SCHEMES, Inputs, Link, World
from moeproof.reference.contract.layouts import SCALE_LAYOUTS
from moeproof.reference.eager.quantise import activations, quantise

Tensor = torch.Tensor
GUILTY = 2
SIZES = "T=14,H=256,I=128,E=7,K=3"
Prepared = list[Any]
"""rows, scales, counts, ids, weights."""
Step = Callable[..., Any]
STANDARD, BATCHED = "eager-alltoall", "eager-batched-alltoall"


def _bytes(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _left_behind(p: Prepared, inputs: Inputs) -> None:
    """Rows were permuted on their way, scales were not."""
    p[1] = _bytes(p[1]).flip(0).view(p[1].dtype)


def _one_row_late(p: Prepared, inputs: Inputs) -> None:
    """In each region every row has the scales of the one before it."""
    p[1] = _bytes(p[1]).roll(1, 1).view(p[1].dtype)


def _of_the_first_row(p: Prepared, inputs: Inputs) -> None:
    p[1] = p[1][:1].expand_as(p[1]).contiguous()


def _never_copied(p: Prepared, inputs: Inputs) -> None:
    """The last row's scales are what the buffer held."""
    _bytes(p[1])[-1] = 0xFF


def _dropped(p: Prepared, inputs: Inputs) -> None:
    """No scales came: the codes are taken for numbers, and quantised again (P24 b)."""
    q = inputs.problem.quant.a1
    assert q is not None
    numbers = activations(p[0], torch.full_like(p[1], 1.0), q, torch.float32).numbers
    p[0], p[1] = quantise(numbers, q, torch.float32, inputs.a1_scale)


def _after_dispatch_by_tensor(p: Prepared, inputs: Inputs) -> None:
    """Quantised once more after dispatch, with one scale for all that arrived."""
    q = inputs.problem.quant.a1
    assert q is not None
    numbers = activations(p[0], p[1], q, torch.float32)
    x = numbers.numbers * _each(p[1], p[0].size(1), q.group[1])
    codes, scale = quantise(x, replace(q, group=(0, 0)), torch.float32)
    p[0], p[1] = codes, scale.expand_as(p[1]).contiguous()


def _each(scales: Tensor, columns: int, size: int) -> Tensor:
    return scales if not size else scales.repeat_interleave(size, dim=1)[:, :columns]


def _reciprocal(p: Prepared, inputs: Inputs) -> None:
    """Scales as their reciprocals: the other convention."""
    p[1] = 1 / p[1]


def _transposed(p: Prepared, inputs: Inputs) -> None:
    """Produced group by group, read row by row (P12 on the wire)."""
    p[1] = p[1].T.contiguous().view(p[1].shape)


def _tiled(p: Prepared, inputs: Inputs) -> None:
    """In the tiles that a kernel wants, though rows and groups are asked for (P25)."""
    p[1] = SCALE_LAYOUTS["swizzled_128x4"].pack(p[1])


def _wide(p: Prepared, inputs: Inputs) -> None:
    """float32 scales where bytes of exponents are the scheme's (P18)."""
    p[1] = p[1].float()


def _padded_rows(p: Prepared, inputs: Inputs) -> None:
    """Scales of as many rows as the buffer has, not as came."""
    p[1] = torch.cat([p[1], p[1][:1]])


def _static_ignored(p: Prepared, inputs: Inputs) -> None:
    """A dynamic scale in the static one's place (P56 before dispatch)."""
    q = inputs.problem.quant.a1
    assert q is not None
    x = activations(p[0], p[1], q, torch.float32).numbers * p[1]
    p[0], p[1] = quantise(x, replace(q, static=False), torch.float32)


def _another_token(p: Prepared, inputs: Inputs) -> None:
    """Codes and scales of one row twice, and another's never: both halves of a row agree, the token is wrong."""
    for t in (p[0], p[1]):
        _bytes(t)[1] = _bytes(t)[0]


@dataclass(frozen=True)
class Planted:
    scheme: str
    name: str
    change: Callable[[Prepared, Inputs], None]
    stage: str
    tensor: str
    words: str


FAULTS = {
    "P24a scales keep the source's order": Planted(
        "fp8_block", STANDARD, _left_behind, "DISPATCH", "row_scales", "the row is here, with other scales"
    ),
    "P24a of tokens": Planted("int8_token", STANDARD, _left_behind, "DISPATCH", "row_scales", "with other scales"),
    "P24a of exponents": Planted("mxfp4_w4a4", STANDARD, _left_behind, "DISPATCH", "row_scales", "with other scales"),
    "P24a of e4m3": Planted("nvfp4", STANDARD, _left_behind, "DISPATCH", "row_scales", "with other scales"),
    "P24a batched": Planted("fp8_block", BATCHED, _one_row_late, "DISPATCH", "row_scales", "with other scales"),
    "P24a in the source's tensor": Planted("fp8_tensor", STANDARD, _left_behind, "DISPATCH", "row_scales", "with other scales"),
    "P24b codes quantised again": Planted("fp8_token", STANDARD, _dropped, "DISPATCH", "row_scales", "with other scales"),
    "the first row's scales for all": Planted("fp8_token", STANDARD, _of_the_first_row, "DISPATCH", "row_scales", "scales"),
    "scales never written": Planted("fp8_block", STANDARD, _never_copied, "DISPATCH", "row_scales", "with other scales"),
    "scales never written, batched": Planted("mxfp8", BATCHED, _never_copied, "DISPATCH", "row_scales", "with other scales"),
    "P14 one scale after dispatch": Planted(
        "fp8_token", STANDARD, _after_dispatch_by_tensor, "QUANT1", "rows", "came in other codes"
    ),
    "reciprocal scales": Planted("fp8_block", STANDARD, _reciprocal, "DISPATCH", "row_scales", "with other scales"),
    "P12 scales transposed": Planted("fp8_block", STANDARD, _transposed, "DISPATCH", "row_scales", "with other scales"),
    "P25 scales in tiles": Planted("mxfp8", STANDARD, _tiled, "DISPATCH", "row_scales", "must be"),
    "P18 scales of another dtype": Planted("mxfp8", STANDARD, _wide, "DISPATCH", "row_scales", "must be"),
    "scales of more rows than came": Planted("fp8_token", STANDARD, _padded_rows, "DISPATCH", "row_scales", "must be"),
    "P56 a dynamic scale for the static one": Planted(
        "fp8_tensor_static", STANDARD, _static_ignored, "QUANT1", "rows", "came in other codes"
    ),
    "another token, codes and scales": Planted("fp8_block", STANDARD, _another_token, "DISPATCH", "rows", "no row here holds"),
}


def line_of(fault: Planted) -> str:
    values = "values=normal" if fault.scheme == "fp8_tensor_static" else "values=groups"
    return line_for(fault.name, 3, f"{values},routing=uniform,spread=uneven", sizes=f"{SIZES},scheme={fault.scheme}")


def judged(line: str, name: str, shown: list[Shown]) -> list[Finding]:
    return [f for result in judge_world(expectation(line, name), shown).values() for f in result.findings]


def planted(fault: Planted) -> list[Finding]:
    """What is found where prepare on the guilty rank returns something else, and all goes on from there."""
    right = PAIRS[fault.name].prepare_finalize

    def wrong(inputs: Inputs, world: World, link: Link) -> Any:
        pf = right(inputs, world, link)
        prepare = pf.prepare

        def call(*arguments: Any) -> Any:
            result = [None if t is None else t.clone() for t in prepare(*arguments)]
            if link.rank == GUILTY:
                fault.change(result, inputs)
            return tuple(result)

        pf.prepare = call  # type: ignore[method-assign]
        return pf

    shapes_only = "must be" in fault.words
    line = line_of(fault)
    if shapes_only:  # no experts would take these: what prepare returned is judged all the same
        (shown,) = simulate(PAIRS[fault.name], parse_case(line))
        result = [shown[GUILTY].get(name) for name in PREPARED]
        fault.change(result, expectation(line, fault.name).ranks[GUILTY].inputs)
        shown[GUILTY] |= {name: t for name, t in zip(PREPARED, result, strict=True) if t is not None}
    else:
        (shown,) = simulate(replace(PAIRS[fault.name], prepare_finalize=wrong), parse_case(line))
    return judged(line, fault.name, shown)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_quantised_dispatch(fault: str) -> None:
    f = FAULTS[fault]
    (healthy,) = simulate(PAIRS[f.name], parse_case(line_of(f)))
    assert not judged(line_of(f), f.name, healthy)
    found = planted(f)

    assert found and {one.rank for one in found} == {GUILTY}, found
    assert (str(found[0].stage), found[0].tensor) == (f.stage, f.tensor) and f.words in found[0].message, str(found[0])


def experts_fault(
    name: str, scheme: str, attribute: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> list[Finding]:
    """What is found where the guilty rank's experts do one step of theirs otherwise."""
    right = PAIRS[name].experts

    def experts(inputs: Inputs) -> Any:
        made = right(inputs)
        if inputs.problem.ep_rank == GUILTY:
            setattr(made, attribute, wrap(getattr(made, attribute)))
        return made

    line = line_for(name, 3, "values=groups,routing=uniform", sizes=f"{SIZES},scheme={scheme}")
    (shown,) = simulate(replace(PAIRS[name], experts=experts), parse_case(line))
    return judged(line, name, shown)


def _half_scale(step: Step) -> Step:
    def call(name: str, *rest: Any) -> Any:
        matrix = step(name, *rest)
        return replace(matrix, scales=matrix.scales / 2) if name == "w2" else matrix

    return call


def _more(step: Step) -> Step:
    return lambda h, *rest: step((h.float() * 1.25).to(h.dtype), *rest)


@pytest.mark.parametrize("name", [STANDARD, BATCHED])
@pytest.mark.parametrize("scheme", ["fp8_block", "int8_tensor", "nvfp4"])
def test_another_experts_scale_on_one_rank(name: str, scheme: str) -> None:
    """Weight scales of GEMM2 halved there: GEMM2 of that rank, on its own codes of h, and nobody's COMBINE."""
    found = experts_fault(name, scheme, "_weights", _half_scale)

    assert found and {(str(f.stage), f.rank) for f in found} == {("GEMM2", GUILTY)}
    assert "of rank" in found[0].message


@pytest.mark.parametrize("name", [STANDARD, BATCHED])
@pytest.mark.parametrize("scheme", ["fp8_token", "mxfp8", "int8_tensor"])
def test_what_quant2_reads_on_one_rank(name: str, scheme: str) -> None:
    """A quarter more than the activation gave goes into QUANT2: the kept h is that, and is judged from the rank's own rows."""
    found = experts_fault(name, scheme, "_quant2", _more)

    assert found and {(str(f.stage), f.rank) for f in found} == {("ACT", GUILTY)}


def test_every_class_that_concerns_scales_on_their_way_is_planted() -> None:
    assert {"P12", "P14", "P18", "P24a", "P24b", "P25", "P56"} <= {name.split()[0] for name in FAULTS}
    assert all(SCHEMES[f.scheme].a1 is not None for f in FAULTS.values())
