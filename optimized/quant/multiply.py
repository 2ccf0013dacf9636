"""What each pair of operand formats is multiplied in, as data, and why nothing is lost before the product.

Codes become the multiplier's format in registers, exactly. Scales multiply float32 partial sums, except where the product
of code and scale is itself exact in the multiplier's format.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.schemes import ALL, Quantiser

DTYPE = "dtype"


@dataclass(frozen=True)
class Multiplier:
    """`operand` is what `tl.dot` gets on both sides: a format's name, or the problem's own dtype."""

    operand: str
    why: str
    max_length: int = 0
    """Longest product that the accumulator holds exactly; 0 = any."""


_SIGNIFICANT = "{} significant bits and exponents {}: bf16 (8 bits), fp16 (11) and fp32 hold every code"

MULTIPLIERS: dict[tuple[str | None, str], Multiplier] = {
    # plain activations: weights become the problem's dtype
    (None, "e4m3fn"): Multiplier(DTYPE, _SIGNIFICANT.format(4, "-9..8")),
    (None, "int8"): Multiplier(DTYPE, "integers up to 256 fit 8 significant bits"),
    (None, "int4"): Multiplier(DTYPE, "integers -8..7"),
    (None, "uint4"): Multiplier(DTYPE, "q - z is an integer -15..15"),
    (None, "e2m1"): Multiplier(
        DTYPE, _SIGNIFICANT.format(2, "-1..2") + "; times an e4m3 scale: 6 bits, exponents -10..11, held as well"
    ),
    # both sides quantised
    ("e4m3fn", "e4m3fn"): Multiplier("e4m3fn", "codes enter as they are"),
    ("int8", "int8"): Multiplier("int8", "codes enter as they are; int32 holds the sum of 2^17 products up to 2^14", 2**17 - 1),
    ("e4m3fn", "int4"): Multiplier("bf16", "4 significant bits against integers -8..7"),
    ("e4m3fn", "e2m1"): Multiplier("bf16", "4 and 2 significant bits"),
    ("e2m1", "e2m1"): Multiplier("bf16", "2 significant bits; times an e4m3 scale 6, exponents -10..11"),
    ("e3m2", "e3m2"): Multiplier("bf16", _SIGNIFICANT.format(3, "-4..4")),
    ("e2m3", "e2m3"): Multiplier("bf16", _SIGNIFICANT.format(4, "-3..2")),
}


def multiplier(x: Quantiser | None, w: Quantiser) -> Multiplier:
    key = (None if x is None else x.fmt, w.fmt)
    check(key in MULTIPLIERS, f"no product of {key[0] or 'plain'} activations and {w.fmt} weights is implemented")
    return MULTIPLIERS[key]


@dataclass(frozen=True)
class Scaling:
    """How one operand's scales take part: in which format they come, and where they multiply."""

    where: str
    """`none`; `sum`: the whole float32 sum; `step`: each partial sum; `value`: each code, exactly (e4m3 scales of e2m1)."""
    rows: int = 1
    """Rows that share a scale; ALL = all."""
    columns: int = ALL

    @property
    def step(self) -> int:
        """Columns after which a partial sum must be scaled, ALL = none."""
        return self.columns if self.where == "step" else ALL


def scaling(q: Quantiser | None) -> Scaling:
    if q is None:
        return Scaling("none")
    rows, columns = q.group
    if columns == ALL:
        return Scaling("sum", rows)
    return Scaling("value" if q.two_level else "step", rows, columns)
