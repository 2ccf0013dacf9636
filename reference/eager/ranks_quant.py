"""QUANT1 of a rank: before dispatch, so that codes travel with their scales, or after it, of the rows that arrived."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moeproof.reference.contract.formats import FORMATS
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.quant_checks import check_scale_values, check_static_scale
from moeproof.reference.contract.schemes import Quantiser, QuantScheme
from moeproof.reference.eager.quantise import quantise, scale_of_tensor
from moeproof.reference.eager.slots import check_unquantised

Tensor = torch.Tensor


@dataclass(frozen=True)
class Payload:
    """What a rank's tokens become on their way."""

    rows: Tensor
    """(T, .): codes, or rows in the problem's dtype."""
    scales: Tensor | None = None
    """(T, G): they travel, each beside its row."""
    one: Tensor | None = None
    """(1, 1): the scale of all rows of all ranks. Every rank knows it, so it stays at home."""
    late: Quantiser | None = None
    """What quantises the rows once they have arrived."""
    given: Tensor | None = None
    """The static scale that it uses."""

    @property
    def columns(self) -> list[Tensor]:
        """What travels."""
        return [self.rows] if self.scales is None else [self.rows, self.scales]

    def received(self, columns: list[Tensor], live: Tensor) -> tuple[Tensor, Tensor | None]:
        """(rows, scales (n, G), (1, 1) or None) of the columns (n, .) that arrived. `live` (n,) rows are for experts here."""
        rows, *scales = columns
        if self.late is not None:
            return quantise(torch.where(live[:, None], rows, 0), self.late, rows.dtype, self.given)
        return rows, scales[0] if scales else self.one


def check_scales(scheme: QuantScheme, a1_scale: Tensor | None, a2_scale: Tensor | None, experts: int, rows: Tensor) -> None:
    """The static scales of a call, of which each rank has its own copy. Reads them."""
    if not scheme.quantised:
        check_unquantised(a1_scale=a1_scale, a2_scale=a2_scale)
    check_static_scale("a1_scale", scheme.a1, a1_scale, 0, rows.device)
    check_static_scale("a2_scale", scheme.a2, a2_scale, experts, rows.device)
    check_scale_values("a1_scale", a1_scale, FORMATS["fp32"])


def send(link: Link, rows: Tensor, scheme: QuantScheme, a1_scale: Tensor | None, quant1: str) -> Payload:
    """Rows (T, H) ready to travel. A collective where one dynamic scale serves the whole world, and only there."""
    q = scheme.a1
    if q is None:
        return Payload(rows)
    if quant1 == "arrival":
        return Payload(rows, late=q, given=a1_scale)
    if q.by_token:
        return Payload(*quantise(rows, q, rows.dtype, a1_scale))
    if quant1 == "world" and not q.static:
        amax = rows.float().abs().amax().view(1) if rows.numel() else torch.zeros(1, device=rows.device)
        one = scale_of_tensor(link.all_gather(amax.to(link.device)).max().to(rows.device), q)
        return Payload(quantise(rows, q, rows.dtype, one)[0], one=one)
    codes, scale = quantise(rows, q, rows.dtype, a1_scale)
    if q.static:
        return Payload(codes, one=scale)
    return Payload(codes, scales=scale.expand(rows.size(0), 1).contiguous())
