"""Number formats and quantisation schemes as data.

A format is what a tensor is stored in; a scheme is how x, w1 and w2 get there. Unquantised rows only, for now: the fields
already name what a quantised row must say (granularity, scale rule, arithmetic).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Format:
    """A binary floating-point format: `bits` stored mantissa bits, exponents of normal values in [emin, emax].

    unit roundoff u = 2^-(bits+1); ulp(x) = 2^(max(floor(log2|x|), emin) - bits). Source: IEEE 754-2019 section 3.3 for
    fp16, fp32 and fp64; bf16 keeps the exponent range of fp32 with 7 mantissa bits.
    """

    name: str
    dtype: torch.dtype
    bits: int
    emin: int
    emax: int

    @property
    def unit(self) -> float:
        """Unit roundoff: the largest relative error of one rounding to nearest."""
        return 2.0 ** -(self.bits + 1)

    @property
    def max(self) -> float:
        """Largest finite value."""
        return (2.0 - 2.0**-self.bits) * 2.0**self.emax


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp64", torch.float64, 52, -1022, 1023),
        Format("fp32", torch.float32, 23, -126, 127),
        Format("bf16", torch.bfloat16, 7, -126, 127),
        Format("fp16", torch.float16, 10, -14, 15),
    )
}


def format_of(dtype: torch.dtype) -> Format:
    """The Format stored as `dtype`. Raises KeyError where dtype is no floating-point format of the table."""
    return next(f for f in FORMATS.values() if f.dtype == dtype)


@dataclass(frozen=True)
class QuantScheme:
    """How activations and weights are quantised. `none`: stored in the problem's dtype, no scales."""

    name: str
    activation: str | None = None
    """Format of the quantised activations, None where they stay in the problem's dtype."""
    weight: str | None = None
    """Format of the stored weights, None where they stay in the problem's dtype."""
    granularity: str | None = None
    """What shares a scale: tensor, token, channel, block128, group32 ..."""
    scale_rule: str | None = None
    """The arithmetic of the scale and of the division by it, by name."""

    @property
    def quantised(self) -> bool:
        return self.activation is not None or self.weight is not None


SCHEMES: dict[str, QuantScheme] = {s.name: s for s in (QuantScheme("none"),)}
