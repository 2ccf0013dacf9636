"""Quantise and dequantise an operand exactly as its row in the scheme table says (reference.contract.schemes).

Values are float64 that hold what a float32 machine would hold: `fl` is the only rounding between steps, so that every step
can be read against RULES and QUOTIENTS. Rounding a float64 quotient of two float32 numbers to float32 is the correctly
rounded float32 quotient, because 53 >= 2 * 24 + 2 (Figueroa, When is double rounding innocuous?, 1995).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.formats import FORMATS, Format
from moeproof.reference.contract.schemes import ALL, Quantiser
from moeproof.reference.oracle.codes import load, round_values, saturate, store
from moeproof.reference.oracle.rounding import exponent_of, power_of_two, round_to

Tensor = torch.Tensor
BLOCK_MAX = FORMATS["e4m3fn"].max
"""Largest block scale of a two-level format: the global scale maps the tensor's amax there."""


def fl(x: Tensor) -> Tensor:
    """float64 x rounded to float32, to nearest even."""
    return x.to(torch.float32).double()


@dataclass(frozen=True)
class Quantised:
    """float64 values of codes and scales. `q` (.., R, C), `s` (.., rows, G) as RULES define them.

    `z` (.., rows, G) zero points and `g` (.., 1, 1) global scales where the row has them. `defined` (.., R, C) bool marks
    elements whose group holds finite values only; under a static scale those that are no NaN, for infinities saturate. The
    contract says nothing of the others.
    """

    quantiser: Quantiser
    q: Tensor
    s: Tensor
    z: Tensor | None = None
    g: Tensor | None = None
    defined: Tensor | None = None

    @property
    def integers(self) -> Tensor:
        """(.., R, C) what the product multiplies before any scale: q, less its zero point."""
        return self.q if self.z is None else self.q - expand(self.z, self.quantiser, self.q.shape)

    @property
    def group_scales(self) -> Tensor:
        """(.., R, G) what multiplies each row's groups, both levels, in float64."""
        s = spread(self.s, -2, self.quantiser.group[0], self.q.shape[-2])
        if self.g is not None:
            s = s * self.g if self.quantiser.rule == "two_level_decode" else s / self.g
        return s.expand(*self.q.shape[:-1], s.shape[-1])

    @property
    def scales(self) -> Tensor:
        """(.., R, C) what multiplies each element."""
        return spread(self.group_scales, -1, self.quantiser.group[1], self.q.shape[-1])

    @property
    def values(self) -> Tensor:
        """(.., R, C) what the codes stand for."""
        return self.integers * self.scales

    def codes(self) -> Tensor:
        """The stored codes (contract: code_shape and the format's dtype)."""
        return store(self.q, self.quantiser.format)

    def scale(self, dtype: Format) -> Tensor:
        """The stored scales (contract: scale_shape) in a problem of this dtype."""
        return store(self.s, self.quantiser.scale_format(dtype))

    def zero_points(self) -> Tensor | None:
        """uint8 (.., R/2, G), two rows to a byte, low nibble = even row."""
        if self.z is None:
            return None
        return store(self.z.transpose(-1, -2), FORMATS["uint4"]).transpose(-1, -2).contiguous()


def expand(s: Tensor, quantiser: Quantiser, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Scales (.., rows, G) -> (.., R, C): each element's own scale. The group size is the row's, never shape / G: a
    ragged last group is shorter, and 130 columns in groups of 128 are 128 and 2, not 65 and 65."""
    return spread(spread(s, -2, quantiser.group[0], shape[-2]), -1, quantiser.group[1], shape[-1])


def spread(s: Tensor, dim: int, size: int, length: int) -> Tensor:
    """`s` with one entry per group of `size` along `dim` -> one per element, `length` of them."""
    index = torch.arange(length, device=s.device)
    index = torch.zeros_like(index) if size == ALL else index // size
    return s.index_select(s.dim() + dim, index)


def reduce_groups(x: Tensor, quantiser: Quantiser, how: str) -> Tensor:
    """(.., R, C) -> (.., rows, G): `amax` or `amin` of each group; 0 for a group without elements (no rows at all)."""
    fill = -torch.inf if how == "amax" else torch.inf
    for dim, size in ((-1, quantiser.group[1]), (-2, quantiser.group[0])):
        n = x.shape[dim]
        short = int(n == 0) if size == ALL else -n % size
        if short:
            pad = list(x.shape)
            pad[dim] = short
            x = torch.cat([x, torch.full(pad, fill, dtype=x.dtype, device=x.device)], dim=dim)
        width = n + short if size == ALL else size
        x = getattr(x.unflatten(dim, ((n + short) // width, width)), how)(dim=dim)
    return torch.where(x.abs() == torch.inf, 0.0, x)


def float32(x: float) -> float:
    """A constant of the scheme table as float32 arithmetic sees it."""
    return float(torch.tensor(x, dtype=torch.float32))


def power_of_two_scale(amax: Tensor, quantiser: Quantiser) -> Tensor:
    """ocp_floor and round_up, from the bits of amax: no logarithm, which errs next to powers of two."""
    fmt = quantiser.format
    if quantiser.rule == "ocp_floor":
        exponent = exponent_of(amax) - fmt.emax
    else:
        ratio = amax / fmt.max  # exact enough: float64 against a float32 amax and a maximum of 4 bits
        exponent = exponent_of(ratio)
        exponent = exponent + (ratio > power_of_two(exponent.clamp(-1022, 1023))).to(torch.int64)
    return power_of_two(exponent.clamp(-127, 127))


def global_scale(x: Tensor, quantiser: Quantiser) -> Tensor:
    """float64 (.., 1, 1): the second level for a whole tensor (.., R, C), by the row's convention."""
    amax = x.abs().amax(dim=(-1, -2), keepdim=True).clamp(min=float32(quantiser.floor))
    full = BLOCK_MAX * quantiser.format.max
    return fl(amax / full) if quantiser.rule == "two_level_decode" else fl(full / amax)


def scales(x: Tensor, quantiser: Quantiser, dtype: Format, given: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """(s, g, floored amax) of float64 x (.., R, C), the stored scales already rounded to their format."""
    q, fmt = quantiser, quantiser.format
    floor = float32(q.floor)
    amax = reduce_groups(x.abs(), q, "amax").clamp(min=floor)
    g = None
    if q.rule == "amax":
        s = given if q.static and given is not None else fl(amax / fmt.max)
    elif q.rule in ("ocp_floor", "round_up"):
        s = power_of_two_scale(amax, q)
    elif q.two_level:
        g = given if given is not None else global_scale(x, q)
        s = fl(reduce_groups(x.abs(), q, "amax") / fmt.max)
        s = fl(s / g) if q.rule == "two_level_decode" else fl(s * g)
    elif q.rule == "signed":
        s = torch.maximum(fl(reduce_groups(x, q, "amax") / 7), fl(-reduce_groups(x, q, "amin") / 8))
    else:
        s = fl((reduce_groups(x, q, "amax").clamp(min=0) - reduce_groups(x, q, "amin").clamp(max=0)) / 15)
    if q.static and not q.two_level:
        return s, g, amax
    form = q.scale_format(dtype)
    rounded = s if form.name == "e8m0" else round_to(saturate(s, form), form)
    return rounded.clamp(min=form.least), g, amax


def quantise(x: Tensor, quantiser: Quantiser, dtype: Format, given: Tensor | None = None) -> Quantised:
    """float64 x (.., R, C), holding float32 or narrower values -> codes and scales.

    `given` float64 (.., 1, 1) is the static scale, or the global scale of a two-level row. Raises ContractError where the
    row is static and nothing is given.
    """
    check(given is not None or not quantiser.static, f"{quantiser.fmt}: the scheme's scale is static, and none was given")
    if quantiser.static and not quantiser.two_level:
        ok = ~x.isnan()
    else:
        ok = expand(reduce_groups(x.isfinite().double(), quantiser, "amin"), quantiser, x.shape) > 0
    x = torch.where(ok, x, 0.0)
    s, g, amax = scales(x, quantiser, dtype, given)
    each = expand(s, quantiser, x.shape)
    if quantiser.quotient == "divide":
        ratio = fl(x / each)
    elif quantiser.quotient == "reciprocal":
        ratio = fl(x * fl(1 / each))
    elif quantiser.quotient == "inverse":
        ratio = fl(x * expand(fl(quantiser.format.max / amax), quantiser, x.shape))
    elif quantiser.quotient == "two_level_decode" and g is not None:
        ratio = fl(x / fl(each * g))
    elif quantiser.quotient == "two_level_encode" and g is not None:
        ratio = fl(x * fl(g / each))
    else:
        return _with_zero_points(x, s, each, quantiser, ok)
    return Quantised(quantiser, round_values(ratio, quantiser.format), s, None, g, ok)


def _with_zero_points(x: Tensor, s: Tensor, each: Tensor, quantiser: Quantiser, ok: Tensor) -> Quantised:
    fmt = quantiser.format
    z = round_values(fl(-reduce_groups(x, quantiser, "amin").clamp(max=0) / s), fmt)
    q = saturate(torch.round(fl(x / each)) + expand(z, quantiser, x.shape), fmt)
    return Quantised(quantiser, q, s, z, None, ok)


def dequantise(
    quantiser: Quantiser, dtype: Format, codes: Tensor, scale: Tensor, zp: Tensor | None = None, g: Tensor | None = None
) -> Quantised:
    """The inverse: stored codes, scales, zero points and global scale (.., 1, 1) -> their float64 values."""
    q = load(codes, quantiser.format)
    s = load(scale, quantiser.scale_format(dtype))
    z = None if zp is None else load(zp.transpose(-1, -2), FORMATS["uint4"]).transpose(-1, -2)
    return Quantised(quantiser, q, s, z, None if g is None else g.double())
