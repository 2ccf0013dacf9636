"""Where a kernel may leave the range of what it computes in, or of what it stores. There nothing can be demanded of it.

On the way to a sum inside float32's range: with P = sum |code_x code_w| over a scale group, s_x and s_w the group's scales
and S = sum P s_x s_w, a kernel may multiply in any of these orders, and what it holds on the way is at most

    ((P s_x) s_w)           P s_x          and then S
    ((P s_w) s_x)           P s_w          and then S
    (P (s_x s_w))           s_x s_w        and then S
    decoded before          |x|, |w|       and then S

in magnitude, partial sums of every order of summation included. Where one of them reaches 2^128 that order gives an infinity,
and infinities of both signs, or one times a code 0, give NaN. Scales that large come from values that overflowed before:
an fp16 activation that became infinite is quantised with the largest scale that its format has.

When an intermediate is stored: a value rounds to infinity from half a step beyond the dtype's maximum on (IEEE 754-2019
section 4.3.1), and fused kernels never store it. Whoever reads it goes on with an infinity or with the value, so what is made
of it is undefined: NaN, which arithmetic carries from there on, through the group whose scale was made of it, the row of the
product, the slot's token. A static scale that reaches its format's maximum inside the dtype's range is the exception: infinity
saturates there like any other value beyond.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moeproof.reference.contract.schemes import Format, Quantiser
from moeproof.reference.oracle.bounds import OVERFLOW

if TYPE_CHECKING:
    from moeproof.reference.oracle.products import Operand

Tensor = torch.Tensor


def may_be_infinite(value: Tensor, error: Tensor, fmt: Format) -> Tensor:
    """bool: elements whose rounding to `fmt`, after an error of at most `error`, may be an infinity."""
    return value.abs() + error >= fmt.max + half_step(fmt)


def half_step(fmt: Format) -> float:
    """Half the distance between neighbours at the maximum of `fmt`."""
    return 2.0 ** (fmt.emax - fmt.bits - 1)


def undefined(value: Tensor, error: Tensor, fmt: Format, q: Quantiser | None = None, given: Tensor | None = None) -> Tensor:
    """bool: elements of an intermediate that the next stage may read as an infinity, to other effect than the value.

    `q` quantises it next, with the static scale `given`, if that is so.
    """
    beyond = may_be_infinite(value, error, fmt)
    if q is None or given is None or not q.static or q.two_level:
        return beyond
    return beyond & (q.format.max * given > fmt.max)


def may_overflow(x: Operand, w: Operand, reach: Tensor) -> Tensor:
    """bool (rows of x, rows of w), or (1, 1) False where nothing comes near. `reach` is S and the error on top of it."""
    if not x.values.numel() or not w.values.numel() or _far_below(x, w):
        return torch.zeros(1, 1, dtype=torch.bool, device=x.values.device)
    over = (reach >= OVERFLOW) | _beyond(x)[:, None] | _beyond(w)[None]
    for left, right in ((x.values, w.codes), (x.codes, w.values)):
        if left is not None and right is not None:
            over |= left.abs() @ right.abs().T >= OVERFLOW
    if x.scales is not None and w.scales is not None:
        for column in range(0, x.values.shape[-1], min((o.group for o in (x, w) if o.group), default=x.values.shape[-1])):
            over |= _at(x, column)[:, None] * _at(w, column)[None] >= OVERFLOW
    return over


def _beyond(o: Operand) -> Tensor:
    """bool (rows,): a decoded value is none of float32."""
    return o.values.abs().amax(dim=-1) >= OVERFLOW


def _at(o: Operand, column: int) -> Tensor:
    """(rows,): the scale of each row at this column."""
    assert o.scales is not None
    return o.scales[:, column // o.group if o.group else 0]


def _far_below(x: Operand, w: Operand) -> bool:
    """Even the largest magnitudes of all rows together stay inside: the ordinary case, at the price of a maximum each."""
    (vx, cx, sx), (vw, cw, sw) = (_largest(o) for o in (x, w))
    return max(vx, vw, sx * sw, x.values.shape[-1] * max(vx * vw, vx * cw, vw * cx)) < OVERFLOW / 2


def _largest(o: Operand) -> tuple[float, float, float]:
    """Magnitudes: of a value, of a code, of a scale. 1 where the values are numbers themselves."""
    value = float(o.values.abs().max())
    if o.scales is None:
        return value, 1.0, 1.0
    return value, max(o.fmt.max, -o.fmt.min), float(o.scales.abs().max())
