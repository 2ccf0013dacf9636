"""Formats and quantisers read number by number, as scheme table and standards say them: what these tests hold kernels to.

Shares no code with the kernels or the oracle. numpy's float32 scalars round every operation once.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import torch

from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.schemes import SCHEMES, Quantiser

Tensor = torch.Tensor
F = np.float32
QUANTISERS: dict[str, Quantiser] = {}
"""Every activation quantiser of the scheme table once, by the first scheme and operand that has it."""
for _scheme in SCHEMES.values():
    for _operand, _q in (("a1", _scheme.a1), ("a2", _scheme.a2)):
        if _q is not None and _q not in QUANTISERS.values():
            QUANTISERS[f"{_scheme.name}.{_operand}"] = _q


@cache
def magnitudes(name: str) -> list[float]:
    """Values of the codes with sign 0, in the order of the codes; NaN codes are left out."""
    exponent_bits, bits, bias = {"e4m3fn": (4, 3, 7), "e2m1": (2, 1, 1), "e3m2": (3, 2, 3), "e2m3": (2, 3, 1)}[name]
    found = []
    for field in range(2**exponent_bits):
        for mantissa in range(2**bits):
            found.append(
                (mantissa * 2.0 ** (1 - bits) if field == 0 else (2**bits + mantissa) * 2.0 ** (field - bits)) / 2**bias
            )
    return found[:-1] if name == "e4m3fn" else found


def decode(code: int, name: str) -> float:
    if name == "e8m0":
        return math.nan if code == 255 else 2.0 ** (code - 127)
    if name == "int8":
        return float(code - 256 if code > 127 else code)
    if name in ("int4", "uint4"):
        return float(code - 8 if name == "int4" else code)
    width = FORMATS[name].width
    magnitude = code & (2 ** (width - 1) - 1)
    if magnitude >= len(magnitudes(name)):
        return math.nan
    return math.copysign(magnitudes(name)[magnitude], -1.0 if code >> (width - 1) else 1.0)


def encode(x: float, name: str) -> int:
    """Clamped, then to the nearest, ties to the even code. int8 as a byte."""
    if name == "int8":
        return int(np.rint(min(max(x, -127.0), 127.0))) & 255
    values = magnitudes(name)
    x_abs = min(abs(x), values[-1])
    code = min(range(len(values)), key=lambda c: (abs(values[c] - x_abs), c % 2))
    return code | (2 ** (FORMATS[name].width - 1) if math.copysign(1.0, x) < 0 else 0)


def _power(amax: float, q: Quantiser) -> int:
    """The code of an e8m0 scale."""
    if amax == 0:
        return 0
    if q.rule == "ocp_floor":
        exponent = math.frexp(amax)[1] - 1 - q.format.emax
    else:
        exponent = next(e for e in range(-160, 130) if amax <= q.format.max * 2.0**e)
    return min(max(exponent, -127), 127) + 127


def group_codes(x: list[Any], amax: Any, q: Quantiser, given: Any) -> tuple[list[int], Any]:
    """(codes of float32 x, stored scale) of one group with this amax; the scale as a float32 or as a code."""
    top = F(q.format.max)
    floored = max(amax, F(q.floor))
    if q.rule in ("ocp_floor", "round_up"):
        stored: Any = _power(float(amax), q)
        return [encode(float(v) / 2.0 ** (stored - 127), q.fmt) for v in x], stored
    if q.two_level:
        s = amax / top
        s = s / given if q.rule == "two_level_decode" else s * given
        stored = max(encode(float(s), "e4m3fn"), 1)
        s = F(decode(stored, "e4m3fn"))
        if q.rule == "two_level_decode":
            return [encode(float(v / (s * given)), q.fmt) for v in x], stored
        return [encode(float(v * (given / s)), q.fmt) for v in x], stored
    s = given if q.static else floored / top
    if q.quotient == "divide":
        return [encode(float(v / s), q.fmt) for v in x], s
    by = F(1) / s if q.quotient == "reciprocal" else top / floored
    return [encode(float(v * by), q.fmt) for v in x], s


def quantise(
    x_RC: Tensor, q: Quantiser, given: list[float] | None, live: list[bool]
) -> tuple[list[list[int]], list[list[Any]]]:
    """(codes, stored scales) of each row; `given` is each row's static or global scale. Rows that are not live: empty."""
    rows = [[F(v) for v in row] for row in x_RC.double().tolist()]
    width = q.group[1] or x_RC.size(1)
    every = max((abs(v) for row, alive in zip(rows, live, strict=True) if alive for v in row), default=F(0))
    codes: list[list[int]] = []
    scales: list[list[Any]] = []
    for r, row in enumerate(rows):
        codes.append([])
        scales.append([])
        for first in range(0, len(row) if live[r] else 0, width):
            group = row[first : first + width]
            amax = max(abs(v) for v in group) if q.by_token else every
            got, s = group_codes(group, amax, q, None if given is None else F(given[r]))
            codes[-1] += got
            scales[-1].append(s)
    return codes, scales


def unpacked(codes: Tensor, fmt: Format) -> list[list[int]]:
    """Stored codes (R, .) as lists of unsigned codes, one per element."""
    rows = codes.view(torch.uint8).tolist()
    return [[n for byte in row for n in (byte & 15, byte >> 4)] for row in rows] if fmt.per_byte == 2 else rows


def stored_scales(scales: Tensor) -> list[list[Any]]:
    """Scales as they are compared: float32 values, or codes."""
    return scales.tolist() if scales.dtype == torch.float32 else scales.view(torch.uint8).tolist()
