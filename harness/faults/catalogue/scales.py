"""Edits of the quantised pipeline: what its faults have in common, and the schemes that each can happen in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moeproof.harness.faults.quant_pipeline import Coded
from moeproof.reference.contract.schemes import SCHEMES, Quantiser, QuantScheme
from moeproof.reference.eager.quantise import Matrix, activations, decode, encode, matmul, quantise

Tensor = torch.Tensor
Given = Tensor | None
GROUP = 32
"""Columns of a group of the microscaling formats."""


def schemes(test: Callable[[QuantScheme], bool]) -> tuple[str, ...]:
    return tuple(name for name, scheme in SCHEMES.items() if scheme.quantised and test(scheme))


def in_x(test: Callable[[Quantiser], bool]) -> tuple[str, ...]:
    """Schemes whose x is quantised in such a way."""
    return schemes(lambda s: s.a1 is not None and test(s.a1))


def in_h(test: Callable[[Quantiser], bool]) -> tuple[str, ...]:
    return schemes(lambda s: s.a2 is not None and test(s.a2))


def in_w(test: Callable[[Quantiser], bool]) -> tuple[str, ...]:
    return schemes(lambda s: s.w is not None and test(s.w))


def grouped(q: Quantiser) -> bool:
    """Several scales along a row."""
    return q.group[1] != 0


def is_mx(q: Quantiser) -> bool:
    return q.scale == "e8m0"


def one_scale(q: Quantiser) -> bool:
    """For the whole tensor."""
    return not q.by_token


def ungrouped(s: QuantScheme) -> bool:
    """No operand has several scales along a row."""
    return not any(q is not None and grouped(q) for q in (s.a1, s.w))


X_PLAIN = {"x is not quantised": schemes(lambda s: s.a1 is None)}
H_PLAIN = {"h is not quantised": schemes(lambda s: s.a2 is None)}


def transposed(s: Tensor) -> Tensor:
    """The other majorness under the same shape."""
    return s.T.reshape(s.shape)


def zero_block_nan(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """No floor below amax, and a quotient by the scale itself: 0 / 0."""
    return Coded(*quantise(x, replace(q, floor=0.0, quotient="divide"), x.dtype, given))


def zero_group_nan(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """The exponent of 0, or 0 / 0: no least scale for a group of zeros."""
    assert right.scales is not None
    zero = (x == 0).unflatten(1, (-1, q.group[1])).all(dim=2)
    nan = torch.full(right.scales.shape, 0xFF if is_mx(q) else 0x7F, dtype=torch.uint8)
    return replace(right, scales=torch.where(zero, nan, right.scales.view(torch.uint8)).view(right.scales.dtype))


def scale_order(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    assert right.scales is not None
    return replace(right, scales=transposed(right.scales))


def power_rule(exponent: Callable[[Tensor, Quantiser], Tensor]) -> Callable[..., Coded]:
    """Groups quantised with another rule for the exponent of each group's amax (float32, > 0)."""

    def wrong(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
        amax = x.float().abs().unflatten(1, (-1, GROUP)).amax(dim=2)
        e = torch.where(amax > 0, exponent(amax.clamp(min=1e-30), q).float(), -127.0).clamp(-127, 127)
        scale = torch.exp2(e.double()).repeat_interleave(GROUP, dim=1)
        return Coded(encode((x.double() / scale).float(), q.format), (e + 127).to(torch.uint8))

    return wrong


def nearest_exponent(amax: Tensor, q: Quantiser) -> Tensor:
    return torch.round(torch.log2(amax / q.format.max))


def floor_of_ratio(amax: Tensor, q: Quantiser) -> Tensor:
    return torch.floor(torch.log2(amax / q.format.max))


def one_off_at_a_power(amax: Tensor, q: Quantiser) -> Tensor:
    """floor + 1 for ceil: another exponent where amax / max is a power of two."""
    return floor_of_ratio(amax, q) + 1


def amax_in_few_bits(amax: Tensor, q: Quantiser) -> Tensor:
    """amax rounded to 4 mantissa bits before its exponent is taken: what lies just below a power of two reaches it."""
    mantissa, exponent = torch.frexp(amax)
    coarse = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    if q.rule == "round_up":
        m, e = torch.frexp(coarse / q.format.max)
        return torch.where(m == 0.5, e - 1, e)
    return torch.frexp(coarse).exponent - 1 - q.format.emax


def granularity_collapse(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """The largest scale of the tensor in every place. Exponents order as their bytes do."""
    s = right.scales
    assert s is not None
    if not s.numel():
        return right
    largest = s.amax() if s.dtype == torch.uint8 else s.float().amax()
    return replace(right, scales=largest.expand(s.shape).to(s.dtype).contiguous())


def other_maximum(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """448 where the format ends at 240, 127 where it has 128, 6 where it has 4; one exponent off under powers of two."""
    s = right.scales
    assert s is not None
    if is_mx(q):
        return replace(right, scales=s + 1)
    if q.two_level:
        return replace(right, scales=(s.float() * (q.format.max / 4.0)).clamp(max=448.0).to(s.dtype))
    return replace(right, scales=s * (q.format.max / (128.0 if q.format.integer else 240.0)))


def clamped_early(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """The scale is given; what is clamped ends at 240."""
    return replace(right, codes=encode(decode(right.codes, q.format).clamp(-240.0, 240.0), q.format))


def dynamic(right: Coded, _: Any, x: Tensor, q: Quantiser, given: Given) -> Coded:
    """A scale, or a global scale, of the values' own."""
    if not q.two_level:
        return Coded(*quantise(x, replace(q, static=False), x.dtype, None))
    full, amax = 448.0 * q.format.max, x.float().abs().amax().clamp(min=1e-10)
    own = amax / full if q.rule == "two_level_decode" else full / amax
    return Coded(*quantise(x, q, x.dtype, own.view(1, 1)))


def zero_rows_nan(right: Coded, _: Any, h: Tensor, q: Quantiser, given: Given) -> Coded:
    """A row of zeros divides by its own amax, and a masked multiply lets the NaN through."""
    s = right.scales
    assert s is not None
    zero = (h == 0).all(dim=1, keepdim=True)
    if s.dtype == torch.uint8:
        return replace(right, scales=torch.where(zero, 255, s).to(torch.uint8))
    return replace(right, scales=torch.where(zero, torch.nan, s.float()).to(s.dtype))


FEW_ROWS = 32
"""Below this many rows the imagined kernel quantises by tensor."""


def by_tensor_if_small(right: Coded, _: Any, h: Tensor, q: Quantiser, given: Given) -> Coded:
    """One scale for all rows in the shape of a scale each: what the small-batch path of another kernel makes."""
    if h.shape[0] >= FEW_ROWS:
        return right
    codes, scale = quantise(h, replace(q, group=(0, 0)), h.dtype, given)
    return Coded(codes, scale.expand(q.scale_shape(*h.shape)).contiguous())


def other_rule_if_small(right: Coded, _: Any, h: Tensor, q: Quantiser, given: Given) -> Coded:
    other = {"ocp_floor": "round_up", "round_up": "ocp_floor"}[q.rule]
    return right if h.shape[0] >= FEW_ROWS else Coded(*quantise(h, replace(q, rule=other), h.dtype, given))


def dynamic_if_small(right: Coded, pipeline: Any, h: Tensor, q: Quantiser, given: Given) -> Coded:
    return right if h.shape[0] >= FEW_ROWS or not h.numel() else dynamic(right, pipeline, h, q, given)


def by_token_if_small(right: Coded, _: Any, h: Tensor, q: Quantiser, given: Given) -> Coded:
    """Codes under a scale for each row beside the one scale that the kernel multiplies by."""
    if h.shape[0] >= FEW_ROWS:
        return right
    return replace(right, codes=quantise(h, replace(q, group=(1, 0), static=False), h.dtype, None)[0])


def scales_stay(right: Tensor, _: Any, x: Coded, tokens: Tensor, inputs: Any) -> Tensor:
    """Rows in their new order, scales in the order in which they left."""
    assert x.scales is not None
    return x.scales[torch.arange(tokens.numel()) % x.scales.shape[0]] if x.scales.shape[0] else right


def codes_requantised(right: Coded, _: Any, moved: Coded, inputs: Any) -> Coded:
    """The codes pass for numbers, and are quantised again with scales of their own."""
    q, dtype = inputs.problem.quant.a1, inputs.problem.fmt.dtype
    return Coded(*quantise(decode(moved.codes, q.format), q, dtype, inputs.a1_scale))


def layout_kept(right: Tensor, _: Any, scales: Tensor, inputs: Any) -> Tensor:
    """After an exchange nobody brings the scales into the kernel's layout; the path of a single rank does."""
    return scales.flatten() if inputs.problem.ep > 1 else right


def exponents_as_numbers(t: Tensor) -> Tensor:
    """The stored byte for the scale that it stands for."""
    return torch.log2(t) + 127


def numbers_as_exponents(t: Tensor) -> Tensor:
    """The exponent field alone."""
    return torch.exp2(torch.floor(torch.log2(t)))


def rows_scaled(name: str, change: Callable[[Tensor], Tensor]) -> Callable[..., Matrix]:
    """What one GEMM loads, with other scales."""

    def wrong(right: Matrix, _: Any, gemm: str, *rest: Any) -> Matrix:
        return right if gemm != name or right.scales is None else replace(right, scales=change(right.scales))

    return wrong


def without_global(right: Matrix, _: Any, name: str, rows: Coded, q: Any, given: Given, dtype: torch.dtype) -> Matrix:
    if name != "gemm1" or rows.scales is None:
        return right
    return activations(rows.codes, rows.scales, q, dtype, None)


def weight_scale_order(right: Matrix, _: Any, inputs: Any, name: str, expert: int) -> Matrix:
    """The other majorness of the stored grid: of blocks, one row of it serves many rows of weights."""
    if name != "w1" or right.scales is None:
        return right
    rows, each = right.scales.shape[0], max(inputs.problem.quant.w.group[0], 1)
    return replace(right, scales=transposed(right.scales[::each]).repeat_interleave(each, dim=0)[:rows])


def weights_scaled(change: Callable[[Tensor], Tensor]) -> Callable[..., Matrix]:
    """w1 with other scales."""

    def wrong(right: Matrix, _: Any, inputs: Any, name: str, expert: int) -> Matrix:
        return right if name != "w1" or right.scales is None else replace(right, scales=change(right.scales))

    return wrong


def weights_without_global(right: Matrix, _: Any, inputs: Any, name: str, expert: int) -> Matrix:
    if name != "w1" or right.scales is None:
        return right
    level = inputs.w1_global[expert]
    return replace(
        right, scales=right.scales / level if inputs.problem.quant.w.rule == "two_level_decode" else right.scales * level
    )


def window(step: int) -> Callable[..., Tensor]:
    """Each tile of `step` columns of GEMM1 takes the weights' next scale, whatever their group is."""

    def wrong(right: Tensor, _: Any, name: str, x: Matrix, w: Matrix) -> Tensor:
        if name != "gemm1" or w.scales is None:
            return right
        groups = w.scales.shape[1]
        if step > w.size:
            one = w.scales[:, :: step // w.size].repeat_interleave(step // w.size, dim=1)[:, :groups]
            return matmul(x, replace(w, scales=one))
        tiles = torch.arange(-(-w.numbers.shape[1] // step)).clamp(max=groups - 1)
        return matmul(x, Matrix(w.numbers, w.scales[:, tiles], step, w.integer))

    return wrong


def tail_scale_oob(right: Tensor, _: Any, name: str, x: Matrix, w: Matrix) -> Tensor:
    """The scale of a short last group is read past the end of its row, where nobody wrote."""
    if name != "gemm1" or w.scales is None or not w.numbers.shape[1] % w.size:
        return right
    return matmul(x, replace(w, scales=torch.cat([w.scales[:, :-1], torch.empty_like(w.scales[:, -1:])], dim=1)))
