"""A value and how far a correct implementation may be from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from moeproof.reference.contract.schemes import Format
from moeproof.reference.oracle.rounding import round_to, ulp


@dataclass(frozen=True)
class Value:
    """`value` float64 (or integer), and the elementwise allowed error of a stored result.

    `bound` None: must agree bit for bit. Elements with bound 0 hold the rounded value and must agree exactly.
    `live` marks the rows that exist; the others (slots that are not routed) may hold anything. `fmt` is the format the
    result is stored in.
    """

    value: torch.Tensor
    bound: torch.Tensor | None = None
    live: torch.Tensor | None = None
    fmt: Format | None = None
    error: torch.Tensor | None = None
    """The part of the bound that precedes the final rounding, where the value is the exact result."""
    typical: Callable[[], torch.Tensor] | None = None
    """Root mean square of that part over correct implementations, where it is derived (typical.py). Worked out when asked."""


Trace = Mapping[str, Value]
"""Canonical tensor name -> Value."""


def stored(exact: torch.Tensor, error: torch.Tensor, fmt: Format, live: torch.Tensor | None = None) -> Value:
    """The Value of `exact` computed with at most `error` before it is rounded once to `fmt`.

    |got - exact| <= error + ulp(|exact| + error) / 2. Where error is 0 the result is the rounded exact value itself.
    """
    rounded = round_to(exact, fmt)
    proved = error == 0
    bound = torch.where(proved, 0.0, error + ulp(exact.abs() + error, fmt) / 2)
    return Value(torch.where(proved, rounded, exact), bound, live, fmt, error)
