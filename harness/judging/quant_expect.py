"""How quantised stages are judged: codes and scales on bits, products on the candidate's own codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from moeproof.harness.judging.compare import Comparison, compare_bits
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.layouts import unpack_nibbles
from moeproof.reference.contract.schemes import Quantiser
from moeproof.reference.oracle.experts import input_rows, live_slots
from moeproof.reference.oracle.products import Operand, decoded, grouped, plain
from moeproof.reference.oracle.quant_stages import quant1, quant2, shown1, shown2
from moeproof.reference.oracle.quantise import Quantised, reduce_groups
from moeproof.reference.oracle.value import Value, stored

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]


def code_dtypes(inputs: Inputs) -> dict[str, torch.dtype]:
    """The one dtype of each quantised tensor."""
    p, scheme = inputs.problem, inputs.problem.quant
    out: dict[str, torch.dtype] = {}
    for q, codes, scale in ((scheme.a1, "xq", "xs"), (scheme.a1, "rows", "row_scales"), (scheme.a2, "hq", "hs")):
        if q is not None:
            out |= {codes: q.format.dtype, scale: q.scale_format(p.fmt).dtype}
    return out


def _unpacked(t: Tensor, q: Quantiser) -> Tensor:
    """Stored codes with one element per code: uint8 where packed, their own dtype otherwise."""
    return unpack_nibbles(t.contiguous()) if q.format.per_byte == 2 else t


def _judge(codes: str, scale: str, shown: Shown, want: Quantised, inputs: Inputs, live: Tensor | None) -> dict[str, Comparison]:
    q = want.quantiser
    assert want.defined is not None
    relevant = want.defined if live is None else want.defined & live[..., None]
    experts = inputs.topk_ids if live is not None else None
    results: dict[str, Comparison] = {}
    if scale in shown:
        groups = want.s.isfinite()
        if q.by_token:
            groups = reduce_groups(relevant.double(), q, "amin") > 0
        elif not q.static and not bool(want.defined.all()):
            groups = torch.zeros_like(groups)
        results[scale] = compare_bits(scale, shown[scale], want.scale(inputs.problem.fmt), groups, experts)
    if codes in shown:
        results[codes] = compare_bits(
            codes, _unpacked(shown[codes], q), _unpacked(want.codes(), q), relevant.expand_as(want.q), experts
        )
    return results


def judge_codes(shown: Shown, inputs: Inputs) -> dict[str, Comparison]:
    """QUANT1 against the oracle's own codes of x; QUANT2 against its codes of the h that the candidate shows.

    hq without h is not judged: the bits of codes mean nothing without what they were made from. GEMM2 and the output are then
    judged on the codes as shown, and end to end.
    """
    results: dict[str, Comparison] = {}
    if "xq" in shown or "xs" in shown:
        results |= _judge("xq", "xs", shown, quant1(inputs), inputs, None)
    if "h" in shown and ("hq" in shown or "hs" in shown):
        results |= _judge("hq", "hs", shown, quant2(inputs, shown["h"]), inputs, live_slots(inputs))
    return results


def _rows(inputs: Inputs, shown: Shown) -> Operand:
    """GEMM1's rows (T, K, H): the candidate's own codes where it shows them, the oracle's otherwise."""
    p = inputs.problem
    if p.quant.a1 is None:
        return plain(input_rows(inputs, inputs.hidden_states), p.fmt)
    own = shown1(inputs, shown["xq"], shown["xs"]) if "xq" in shown and "xs" in shown else quant1(inputs)
    return decoded(own).in_slots(inputs.topk_ids.shape[1])


def _hidden(inputs: Inputs, shown: Shown) -> Operand:
    """GEMM2's rows (T, K, I)."""
    p = inputs.problem
    if p.quant.a2 is None:
        return plain(shown["h"], p.fmt)
    if "hq" in shown and "hs" in shown:
        return decoded(shown2(inputs, shown["hq"], shown["hs"]))
    return decoded(quant2(inputs, shown["h"]))


def knows_hidden(shown: Shown) -> bool:
    """Whether the candidate shows what its GEMM2 read: h, or its codes with their scales."""
    return "h" in shown or ("hq" in shown and "hs" in shown)


def operand(inputs: Inputs, name: str, shown: Shown) -> Operand:
    """What GEMM1 (`name` gate_up) or GEMM2 (y) multiplies by its weights."""
    return _rows(inputs, shown) if name == "gate_up" else _hidden(inputs, shown)


def product(inputs: Inputs, name: str, shown: Shown, fmt: Format, claims: Claims) -> Value:
    """gate_up or y, isolated: on the values that the operands' codes stand for."""
    p = inputs.problem
    rows = operand(inputs, name, shown)
    if name == "gate_up":
        exact, error = grouped(inputs, "w1", rows, inputs.b1, claims, p.N)
    else:
        exact, error = grouped(inputs, "w2", rows, inputs.b2, claims, p.hidden)
    return stored(exact, error, fmt, live_slots(inputs))


def dispatched(rows: Tensor, row_scales: Tensor | None, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """(rows (e, C, .), what each slot must find there (T, K, .)), comparable by bytes: codes with their own scales."""
    scheme, T, K = inputs.problem.quant, *inputs.topk_ids.shape
    if scheme.a1 is None:
        return rows, input_rows(inputs, inputs.hidden_states).to(rows.dtype)
    want = quant1(inputs)
    codes = want.codes().view(torch.uint8)
    rows = rows.contiguous().view(torch.uint8)
    if row_scales is not None:
        scales = want.scale(inputs.problem.fmt)
        scales = scales.expand(T, scales.shape[1]).contiguous().view(torch.uint8)
        codes = torch.cat([codes, scales], dim=-1)
        beside = row_scales.expand(*rows.shape[:2], row_scales.shape[2]).contiguous().view(torch.uint8)
        rows = torch.cat([rows, beside], dim=-1)
    return rows, codes[:, None].expand(T, K, codes.shape[-1])


def wrong_row_scales(rows: Tensor, row_scales: Tensor | None, inputs: Inputs) -> str | None:
    """What is wrong with the shapes of dispatched codes and scales, in words; None where they fit each other."""
    a1, H = inputs.problem.quant.a1, inputs.problem.hidden
    if a1 is None:
        return None
    e, C = rows.shape[:2]
    if rows.dim() != 3 or tuple(rows.shape) != a1.code_shape(e, C, H):
        return f"rows are {tuple(rows.shape)}, must be (experts, rows, {a1.code_shape(1, H)[-1]}) codes"
    want = a1.scale_shape(e, C, H)
    if row_scales is None or tuple(row_scales.shape) != want:
        return f"has shape {None if row_scales is None else tuple(row_scales.shape)}, must be {want}"
    return None
