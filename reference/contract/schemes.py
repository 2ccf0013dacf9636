"""Quantisation schemes as data: one row each, which names every step of the arithmetic.

Quantising one operand means: cut it into groups, take each group's amax, turn it into a scale by `rule`, store the scale
in `scale`, divide by it as `quotient` says, clamp to the format's range, and round once, ties to even. All steps before the
last are float32 operations, each rounded to nearest even (`fl`). The words of RULES and QUOTIENTS are the specification:
another spelling of the same formula flips up to 0.1% of the codes (docs/tolerances.md section 8).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.formats import FORMATS, Format, format_of

__all__ = ["FORMATS", "QUOTIENTS", "RULES", "SCHEMES", "Format", "QuantScheme", "Quantiser", "format_of"]

RULES = {
    "amax": "s = fl(max(amax, floor) / max)",
    "ocp_floor": "s = 2^(floor(log2 amax) - emax): values above the format's maximum saturate (OCP MX 1.0 section 6.3)",
    "round_up": "s = 2^e with the least e for which amax <= max 2^e: nothing saturates",
    "two_level_decode": "global S = fl(amax of the tensor / (448 max)); s = fl(fl(amax / max) / S), clamped to 448; x ~ q s S",
    "two_level_encode": "global S = fl(448 max / amax of the tensor); s = fl(fl(amax / max) * S), clamped to 448; x ~ q s / S",
    "signed": "s = max(fl(largest / 7), fl(-smallest / 8)): uses all 16 codes of a two's complement integer",
    "zero_point": "s = fl((largest - smallest) / 15), both including 0; z = round(fl(-smallest / s)); x ~ (q - z) s",
}
"""How a group's amax becomes its scale. A stored scale is rounded to its format, ties to even, and never is 0: what would
round to 0 becomes the format's least positive value, so that nothing is divided by 0 and a group of zeros decodes to 0."""

QUOTIENTS = {
    "divide": "fl(x / s)",
    "reciprocal": "fl(x * fl(1 / s))",
    "inverse": "fl(x * fl(max / max(amax, floor)))",
    "two_level_decode": "fl(x / fl(s * S))",
    "two_level_encode": "fl(x * fl(S / s))",
    "zero_point": "round(fl(x / s)) + z, clamped after the sum",
}
"""What is clamped to the format's range and rounded. IEEE division and multiplication, no contraction to fma."""

ALL = 0
"""A group that spans the whole of a dim."""


@dataclass(frozen=True)
class Quantiser:
    """How one operand, a matrix (rows, columns) with the reduction along its columns, gets its codes and scales."""

    fmt: str
    group: tuple[int, int]
    """(rows, columns) of what shares one scale; ALL = the whole dim. A tensor (ALL, ALL), a token or channel (1, ALL)."""
    rule: str = "amax"
    scale: str = "fp32"
    """Format of the stored scale; "dtype" is the problem's own."""
    quotient: str = "divide"
    floor: float = 0.0
    """Least amax, in float32."""
    static: bool = False
    """The scale (of a two-level rule: its global scale) is given and used verbatim; otherwise it comes from the values."""
    ragged: bool = True
    """Whether the last group of a row may be shorter than the others."""

    def __post_init__(self) -> None:
        known("format of a quantiser", self.fmt, FORMATS)
        known("scale rule", self.rule, RULES)
        known("quotient", self.quotient, QUOTIENTS)
        known("scale format", self.scale, ("dtype", *FORMATS))
        check(
            not self.static or self.two_level or self.group == (ALL, ALL),
            "a static scale is one for the whole tensor, or global",
        )

    @property
    def format(self) -> Format:
        return FORMATS[self.fmt]

    @property
    def two_level(self) -> bool:
        return self.rule.startswith("two_level")

    @property
    def zero_points(self) -> bool:
        return self.rule == "zero_point"

    @property
    def by_token(self) -> bool:
        """Each row has scales of its own."""
        return self.group[0] == 1

    def scale_format(self, dtype: Format) -> Format:
        """Format of the stored scales in a problem of this dtype."""
        return dtype if self.scale == "dtype" else FORMATS[self.scale]

    def groups(self, columns: int) -> int:
        """G: scale groups along a row of `columns` elements."""
        return 1 if self.group[1] == ALL else -(-columns // self.group[1])

    def code_shape(self, *shape: int) -> tuple[int, ...]:
        """Shape of the stored codes of a (.., rows, columns) tensor: columns halve where two codes share a byte."""
        return (*shape[:-1], shape[-1] // self.format.per_byte)

    def scale_shape(self, *shape: int) -> tuple[int, ...]:
        """Shape of the stored scales of a (.., rows, columns) tensor.

        tensor (.., 1, 1); token and channel (.., rows, 1); block (.., ceil(rows / br), ceil(columns / bc)).
        """
        rows = 1 if self.group[0] == ALL else -(-shape[-2] // self.group[0])
        return (*shape[:-2], rows, self.groups(shape[-1]))

    def check_columns(self, operand: str, columns: int) -> None:
        """Refuse a reduction length that this quantiser cannot cut into groups or pack."""
        size, per_byte = self.group[1], self.format.per_byte
        check(
            self.ragged or size == ALL or columns % size == 0,
            f"{operand} has {columns} columns, which groups of {size} do not divide; the scheme allows no ragged group",
        )
        check(columns % per_byte == 0, f"{operand} has {columns} columns; {self.fmt} packs {per_byte} to a byte")


@dataclass(frozen=True)
class QuantScheme:
    """How x (QUANT1), h (QUANT2) and the weights are quantised. None: stays in the problem's dtype, no scales."""

    name: str
    a1: Quantiser | None = None
    a2: Quantiser | None = None
    w: Quantiser | None = None

    @property
    def quantised(self) -> bool:
        return self.w is not None

    def check_sizes(self, hidden: int, intermediate: int, n: int) -> None:
        """Refuse sizes that the scheme cannot pack or cut into groups. `n` is w1's number of rows."""
        for operand, quantiser, columns in (
            ("x", self.a1, hidden),
            ("w1", self.w, hidden),
            ("h", self.a2, intermediate),
            ("w2", self.w, intermediate),
        ):
            if quantiser is not None:
                quantiser.check_columns(f"scheme {self.name}: {operand}", columns)
        if self.w is not None and self.w.zero_points:
            for operand, rows in (("w1", n), ("w2", hidden)):
                check(rows % 2 == 0, f"scheme {self.name}: {operand} has {rows} rows; zero points pack 2 rows to a byte")


def _fp8(group: tuple[int, int], quotient: str = "divide", static: bool = False, fmt: str = "e4m3fn") -> Quantiser:
    return Quantiser(fmt, group, quotient=quotient, floor=1e-10, static=static)


def _mx(fmt: str, rule: str) -> Quantiser:
    return Quantiser(fmt, (1, 32), rule, scale="e8m0", ragged=False)


def _int4(group: int, rule: str = "signed") -> Quantiser:
    fmt = "uint4" if rule == "zero_point" else "int4"
    quotient = "zero_point" if rule == "zero_point" else "divide"
    return Quantiser(fmt, (1, group), rule, scale="dtype", quotient=quotient, ragged=False)


def _nvfp4(convention: str, static: bool = False) -> Quantiser:
    rule = f"two_level_{convention}"
    return Quantiser("e2m1", (1, 16), rule, scale="e4m3fn", quotient=rule, static=static, floor=1e-10, ragged=False)


TENSOR, ROW = (ALL, ALL), (1, ALL)
_FP8_DYNAMIC, _FP8_STATIC = _fp8(TENSOR, "reciprocal"), _fp8(TENSOR, "reciprocal", static=True)
_FP8_TOKEN, _FP8_TENSOR_W = _fp8(ROW), _fp8(TENSOR)
_INT8_ROW = Quantiser("int8", ROW, quotient="inverse", floor=1e-10)
_INT8_W = Quantiser("int8", ROW, floor=1e-10)
_MXFP8, _MXFP8_UP = _mx("e4m3fn", "ocp_floor"), _mx("e4m3fn", "round_up")
_MXFP4, _MXFP4_UP = _mx("e2m1", "ocp_floor"), _mx("e2m1", "round_up")

SCHEMES: dict[str, QuantScheme] = {
    s.name: s
    for s in (
        QuantScheme("none"),
        # fp8 with float32 scales
        QuantScheme("fp8_tensor", _FP8_DYNAMIC, _FP8_DYNAMIC, _FP8_TENSOR_W),
        QuantScheme("fp8_tensor_static", _FP8_STATIC, _FP8_STATIC, _FP8_TENSOR_W),
        QuantScheme("fp8_tensor_static2", _FP8_DYNAMIC, _FP8_STATIC, _FP8_TENSOR_W),
        QuantScheme("fp8_token", _FP8_TOKEN, _FP8_TOKEN, _fp8(ROW)),
        QuantScheme("fp8_block", _fp8((1, 128)), _fp8((1, 128)), _fp8((128, 128))),
        QuantScheme("fp8_w8a16", None, None, _fp8(ROW)),
        # int8
        QuantScheme("int8_token", _INT8_ROW, _INT8_ROW, _INT8_W),
        QuantScheme(
            "int8_tensor",
            Quantiser("int8", TENSOR, quotient="reciprocal", floor=1e-10),
            Quantiser("int8", TENSOR, quotient="reciprocal", floor=1e-10),
            Quantiser("int8", TENSOR, floor=1e-10),
        ),
        QuantScheme("int8_w8a16", None, None, _INT8_W),
        # int4 weights
        *(QuantScheme(f"int4_w4a16_g{g}", None, None, _int4(g)) for g in (32, 64, 128)),
        *(QuantScheme(f"int4_w4a16_zp_g{g}", None, None, _int4(g, "zero_point")) for g in (32, 64, 128)),
        QuantScheme("int4_w4a8", _FP8_TOKEN, _FP8_TOKEN, _int4(128)),
        # microscaling: groups of 32 with a power-of-two scale
        QuantScheme("mxfp8", _MXFP8, _MXFP8, _MXFP8),
        QuantScheme("mxfp8_up", _MXFP8_UP, _MXFP8_UP, _MXFP8_UP),
        QuantScheme("mxfp6_e3m2", *(_mx("e3m2", "ocp_floor"),) * 3),
        QuantScheme("mxfp6_e2m3", *(_mx("e2m3", "ocp_floor"),) * 3),
        QuantScheme("mxfp4_w4a16", None, None, _MXFP4),
        QuantScheme("mxfp4_w4a8", _MXFP8, _MXFP8, _MXFP4),
        QuantScheme("mxfp4_w4a8_up", _MXFP8_UP, _MXFP8_UP, _MXFP4_UP),
        QuantScheme("mxfp4_w4a8_static", _FP8_STATIC, _FP8_STATIC, _MXFP4),
        QuantScheme("mxfp4_w4a4", _MXFP4, _MXFP4, _MXFP4),
        QuantScheme("mxfp4_w4a4_up", _MXFP4_UP, _MXFP4_UP, _MXFP4_UP),
        # nvfp4: groups of 16 with an e4m3 scale, and one float32 scale above them
        QuantScheme("nvfp4", _nvfp4("decode", True), _nvfp4("decode", True), _nvfp4("decode")),
        QuantScheme("nvfp4_encode", _nvfp4("encode", True), _nvfp4("encode", True), _nvfp4("encode")),
        QuantScheme("nvfp4_w4a16", None, None, _nvfp4("decode")),
    )
}


def scale_dtype(quantiser: Quantiser, dtype: Format) -> torch.dtype:
    """torch dtype of the stored scales in a problem of this dtype: float32, uint8 (e8m0), float8_e4m3fn, or its own."""
    return quantiser.scale_format(dtype).dtype
