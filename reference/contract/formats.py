"""Number formats as data: what a code means is a fact of its row here, never of the code that reads it.

Sources: IEEE 754-2019 section 3.3 (fp16, fp32, fp64); OCP 8-bit Floating Point Specification 1.0 (e4m3fn, e5m2); OCP
Microscaling Formats 1.0 section 5.3 (e2m1, e2m3, e3m2, e8m0); Noune et al., arXiv 2206.02915 (e4m3fnuz).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

SPECIALS = {
    "ieee": "the all-ones exponent holds infinities and NaN",
    "fn": "no infinities; the all-ones exponent holds numbers, except S.1111.111 which is NaN",
    "fnuz": "no infinities, no negative zero: its code is the one NaN",
    "last": "the last code is NaN (e8m0: 255)",
    "none": "every code is a number",
}


@dataclass(frozen=True)
class Format:
    """`bits` stored mantissa bits, exponents of normal values in [emin, emax].

    unit roundoff u = 2^-(bits+1); ulp(x) = 2^(max(floor(log2|x|), emin) - bits). An integer format is the float whose
    only binade below its maximum is subnormal: emin = emax = bits, so that its ulp is 1 everywhere.

    A code is sign, exponent and mantissa from its highest bit to its lowest; `width` bits of it count. Integers: two's
    complement, or offset binary (code - `offset`) where there is an offset.
    """

    name: str
    dtype: torch.dtype
    """What a tensor of codes is stored in: the torch dtype of the format, or uint8 where torch has none."""
    bits: int
    emin: int
    emax: int
    width: int
    specials: str = "ieee"
    signed: bool = True
    top: float | None = None
    """Largest finite value, where NaN takes the place of the one that bits and emax give."""
    per_byte: int = 1
    """Codes per stored element. Two: the low nibble holds the even column (docs/models.md section 7)."""
    integer: bool = False
    offset: int = 0

    @property
    def unit(self) -> float:
        """Unit roundoff: the largest relative error of one rounding to nearest."""
        return 2.0 ** -(self.bits + 1)

    @property
    def max(self) -> float:
        """Largest finite value."""
        return (2.0 - 2.0**-self.bits) * 2.0**self.emax if self.top is None else self.top

    @property
    def min(self) -> float:
        """Smallest value: -max, one less for two's complement, 0 where unsigned."""
        if not self.signed:
            return 2.0**self.emin if self.name == "e8m0" else 0.0
        return -self.max - 1.0 if self.integer else -self.max

    @property
    def low(self) -> float:
        """Where a quantiser clamps from below: -max (int8 leaves -128 unused), or min where all codes are used."""
        return self.min if self.offset or not self.signed else -self.max

    @property
    def least(self) -> float:
        """Least positive value."""
        return 2.0 ** (self.emin - self.bits)

    @property
    def bias(self) -> int:
        """Exponent bias: a normal value's exponent field is its exponent plus this."""
        return 127 if self.name == "e8m0" else 1 - self.emin


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp64", torch.float64, 52, -1022, 1023, 64),
        Format("fp32", torch.float32, 23, -126, 127, 32),
        Format("bf16", torch.bfloat16, 7, -126, 127, 16),
        Format("fp16", torch.float16, 10, -14, 15, 16),
        Format("tf32", torch.float32, 10, -126, 127, 19),  # stored as float32, the low 13 bits not used
        Format("e4m3fn", torch.float8_e4m3fn, 3, -6, 8, 8, "fn", top=448.0),
        Format("e4m3fnuz", torch.float8_e4m3fnuz, 3, -7, 7, 8, "fnuz"),
        Format("e5m2", torch.float8_e5m2, 2, -14, 15, 8),
        # Triton and most kernels take these as bytes; torch has names for some of them but no arithmetic.
        Format("e8m0", torch.uint8, 0, -127, 127, 8, "last", signed=False),  # 2^(code - 127): no zero, no sign
        Format("e2m1", torch.uint8, 1, 0, 2, 4, "none", per_byte=2),
        Format("e3m2", torch.uint8, 2, -2, 4, 6, "none"),  # one code a byte, in its low six bits
        Format("e2m3", torch.uint8, 3, 0, 2, 6, "none"),
        Format("int8", torch.int8, 6, 6, 6, 8, "none", integer=True),
        Format("int4", torch.uint8, 2, 2, 2, 4, "none", integer=True, per_byte=2, offset=8),  # -8..7 as 0..15
        Format("uint4", torch.uint8, 3, 3, 3, 4, "none", integer=True, per_byte=2, signed=False),  # with a zero point
    )
}


def format_of(dtype: torch.dtype) -> Format:
    """The Format that torch computes with as `dtype`. Raises StopIteration where there is none (uint8 is storage only)."""
    return next(f for f in FORMATS.values() if f.dtype == dtype and dtype != torch.uint8)
