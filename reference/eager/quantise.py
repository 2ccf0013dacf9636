"""Quantisers in plain float32 PyTorch, and products of what they make. A second reading of the scheme table.

Independent of the oracle on purpose: fp8 codes come from torch's float32 casts after an explicit clamp, narrower ones from
a search for the nearest of all codes, exponents from frexp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.formats import Format, format_of
from moeproof.reference.contract.layouts import pack_nibbles, unpack_nibbles
from moeproof.reference.contract.schemes import ALL, Quantiser

Tensor = torch.Tensor


@cache
def _values(fmt: Format) -> Tensor:
    """float64 (2^width,): what each code of a 4- or 6-bit float means."""
    half = 1 << (fmt.width - 1)
    magnitudes = []
    for code in range(half):
        exponent, mantissa = divmod(code, 1 << fmt.bits)
        magnitudes.append(float(mantissa) if exponent == 0 else (mantissa + (1 << fmt.bits)) * 2.0 ** (exponent - 1))
    values = torch.tensor(magnitudes, dtype=torch.float64) * fmt.least
    return torch.cat([values, -values])


def _two_to(exponent: Tensor) -> Tensor:
    """float64 2^exponent for integers, from its bits: pow may be off by an ulp."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def encode(x: Tensor, fmt: Format) -> Tensor:
    """float32 x -> stored codes of `fmt`: clamped, then rounded to the nearest, ties to even."""
    x = torch.clamp(x, fmt.low, fmt.max)
    if fmt.dtype.is_floating_point:
        return x.to(fmt.dtype)
    if fmt.integer:
        codes = torch.round(x).to(torch.int32) + fmt.offset
        return pack_nibbles(codes) if fmt.per_byte == 2 else codes.to(fmt.dtype)
    values = _values(fmt).to(x.device)
    distance = (x.double()[..., None] - values).abs()
    # Of two nearest codes the even one; of the two zeros the one with the sign of x.
    odd = torch.arange(values.numel(), device=x.device) % 2
    wrong_sign = (torch.arange(values.numel(), device=x.device) >= values.numel() // 2) != x.signbit()[..., None]
    near = distance == distance.amin(dim=-1, keepdim=True)
    codes = (near.to(torch.int32) * 4 - odd.to(torch.int32) - 2 * wrong_sign.to(torch.int32)).argmax(dim=-1)
    return pack_nibbles(codes) if fmt.per_byte == 2 else codes.to(torch.uint8)


def decode(stored: Tensor, fmt: Format) -> Tensor:
    """Stored codes -> float32 values, exactly."""
    if fmt.dtype.is_floating_point:
        return stored.float()
    codes = unpack_nibbles(stored) if fmt.per_byte == 2 else stored
    if fmt.name == "e8m0":
        return torch.where(codes == 255, torch.nan, _two_to(codes.to(torch.int64) - 127)).float()
    if fmt.integer:
        return codes.float() - fmt.offset
    return _values(fmt).to(stored.device)[codes.long()].float()


def _padded(x: Tensor, size: int, fill: float) -> Tensor:
    """(R, C) -> (R, G, size), the last group filled up; (R, 1, C) where the group spans the row."""
    size = max(x.size(1), 1) if size == ALL else size
    short = -x.size(1) % size if x.size(1) else size
    return torch.nn.functional.pad(x, (0, short), value=fill).view(x.size(0), (x.size(1) + short) // size, size)


def _amax(x: Tensor, q: Quantiser) -> Tensor:
    """float32 (R, G), or (1, 1) where one scale serves the whole tensor."""
    if q.group == (ALL, ALL):
        return x.abs().amax().view(1, 1) if x.numel() else x.new_zeros(1, 1)
    return _padded(x.abs(), q.group[1], 0.0).amax(dim=2)


def _each(s: Tensor, q: Quantiser, columns: int) -> Tensor:
    """Scales (R or 1, G) -> (R or 1, columns or 1): every column's own."""
    return s if q.group[1] == ALL else s.repeat_interleave(q.group[1], dim=1)[:, :columns]


def _over_max(amax: Tensor, q: Quantiser) -> Tensor:
    """amax / max, rounded once. By a tensor: a GPU divides by a number as a product with its reciprocal, which rounds twice."""
    return amax / torch.tensor(q.format.max, dtype=torch.float32, device=amax.device)


def _power_of_two(amax: Tensor, q: Quantiser) -> Tensor:
    """Exponents int32 of MX scales, in [-127, 127]."""
    if q.rule == "ocp_floor":
        exponent = torch.frexp(amax).exponent - 1 - q.format.emax
    else:
        mantissa, exponent = torch.frexp(_over_max(amax, q))
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    return torch.where(amax == 0, -127, exponent).clamp(-127, 127)


def scale_of_tensor(amax: Tensor, q: Quantiser) -> Tensor:
    """float32 (1, 1): the dynamic scale of a whole tensor whose largest magnitude is known."""
    floor = torch.tensor(q.floor, dtype=torch.float32, device=amax.device)
    return _over_max(torch.maximum(amax, floor), q).view(1, 1)


def quantise(x: Tensor, q: Quantiser, dtype: torch.dtype, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (R, C), any float dtype -> (codes, scales) as stored. For activations: groups of one row, or the whole tensor.

    `given` float32 (1, 1) or (R, 1): the static scale, used verbatim, or the global scale of a two-level rule. A dynamic rule
    takes it for the scale of a larger tensor, of which x is a part.
    """
    if q.static and given is None:
        raise ContractError(f"the static scale of {q.fmt} activations is None, must be float32 (1, 1)")
    x = x.float()
    amax = _amax(x, q)
    floored = torch.clamp(amax, min=torch.tensor(q.floor, dtype=torch.float32, device=x.device))
    if q.rule in ("ocp_floor", "round_up"):
        exponent = _power_of_two(amax, q)
        s = _two_to(exponent)
        return encode((x.double() / _each(s, q, x.size(1))).float(), q.format), (exponent + 127).to(torch.uint8)
    if q.two_level:
        assert given is not None
        s = _over_max(amax, q)
        s = s / given if q.rule == "two_level_decode" else s * given
        form = q.scale_format(format_of(dtype))
        stored = torch.clamp(s, form.least, form.max).to(form.dtype)
        each = _each(stored.float(), q, x.size(1))
        ratio = x / (each * given) if q.rule == "two_level_decode" else x * (given / each)
        return encode(ratio, q.format), stored
    s = _over_max(floored, q) if given is None else given
    each = _each(s, q, x.size(1))
    if q.quotient == "divide":
        ratio = x / each
    elif q.quotient == "reciprocal":
        ratio = x * (1.0 / each)
    else:
        # A tensor on both sides: torch turns number / tensor into a reciprocal and a product, which rounds twice.
        inverse = torch.full_like(floored, q.format.max) / floored
        ratio = x * _each(inverse, q, x.size(1))
    return encode(ratio, q.format), s.clone()


@dataclass(frozen=True)
class Matrix:
    """(R, A) as a product takes it: float32 `numbers` without scales, and `scales` float32 (R or 1, G) for groups of `size`."""

    numbers: Tensor
    scales: Tensor | None = None
    size: int = ALL
    integer: bool = False


def plain(x: Tensor) -> Matrix:
    return Matrix(x.float())


def activations(codes: Tensor, scale: Tensor, q: Quantiser, dtype: torch.dtype, g: Tensor | None = None) -> Matrix:
    """Stored rows (R, .) and their scales (R or 1, G); `g` (R or 1, 1) is the global scale of a two-level rule."""
    s = decode(scale, q.scale_format(format_of(dtype)))
    if q.two_level and g is not None:
        s = s * g if q.rule == "two_level_decode" else s / g
    return Matrix(decode(codes, q.format), s, q.group[1], q.format.integer)


def weights(codes: Tensor, scale: Tensor, zp: Tensor | None, g: Tensor | None, q: Quantiser, dtype: torch.dtype) -> Matrix:
    """One expert's stored weights (rows, .), scales (rows, G) by the row's own shape rule, zero points (rows / 2, G)."""
    numbers = decode(codes, q.format)
    rows, columns = numbers.shape
    s = decode(scale, q.scale_format(format_of(dtype)))
    if q.group[0] not in (1, ALL):
        s = s.repeat_interleave(q.group[0], dim=0)[:rows]
    if zp is not None:
        points = torch.stack([zp & 15, zp >> 4], dim=1).flatten(0, 1).float()
        numbers = numbers - _each(points, q, columns)
    if g is not None:
        s = s * g if q.rule == "two_level_decode" else s / g
    return Matrix(numbers, s, q.group[1], q.format.integer)


def matmul(x: Matrix, w: Matrix, bias: Tensor | None = None) -> Tensor:
    """float32 (R, B): x @ w^T (+ bias). Numbers are multiplied as they are; each group's sum is then scaled, in float32.

    Integer sums are exact, as int32 accumulation is.
    """
    columns = x.numbers.size(1)
    step = min((m.size for m in (x, w) if m.size != ALL), default=max(columns, 1))
    exact = x.integer and w.integer
    total = torch.zeros(x.numbers.size(0), w.numbers.size(0), dtype=torch.float32, device=x.numbers.device)
    for start in range(0, columns, step):
        a, b = x.numbers[:, start : start + step], w.numbers[:, start : start + step]
        part = (a.double() @ b.double().T).float() if exact else a @ b.T
        if x.scales is not None:
            part = part * x.scales[:, start // x.size if x.size != ALL else 0][:, None]
        if w.scales is not None:
            part = part * w.scales[:, start // w.size if w.size != ALL else 0][None, :]
        total += part
    return total if bias is None else total + bias.float()
