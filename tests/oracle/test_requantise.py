"""Constants of the end-to-end bound for flipped codes follow from how likely a flip is (reference/oracle/requantise.py)."""

from __future__ import annotations

import math

import torch

from moeproof.reference.oracle.requantise import FLIPS, LIKELY, SIGMAS


def flipping(distance: float) -> float:
    """Chance that a normal deviate crosses a boundary this many standard deviations away."""
    return math.erfc(distance / math.sqrt(2)) / 2


def average(first: float, last: float) -> float:
    """Mean chance over values spread evenly between two distances."""
    steps = 20_000
    return sum(flipping(first + (last - first) * (i + 0.5) / steps) for i in range(steps)) / steps


def beyond(chance: float, n: int, limit: float) -> float:
    """P(|sum of n independent steps| > limit), each +1 or -1 with chance/2 and else 0. Exact: a convolution."""
    one = torch.tensor([chance / 2, 1 - chance, chance / 2], dtype=torch.float64)
    total = torch.ones(1, dtype=torch.float64)
    for _ in range(n):
        total = torch.nn.functional.conv1d(total[None, None], one[None, None], padding=2)[0, 0]
    where = torch.arange(-n, n + 1)
    return float(total[where.abs() > limit + 1e-9].sum())


def test_within_the_window_a_quarter_of_a_squared_jump_is_the_mean_of_what_flips_do() -> None:
    assert average(0, LIKELY) <= 1 / 4 < average(0, LIKELY - 0.1), "the smallest such window, to a tenth"


def test_rare_flips_pass_the_bound_as_rarely_as_seven_sigmas() -> None:
    """n elements beyond the window add up to a bound of FLIPS sqrt(n) jumps, for every n. Half as many flips would not do."""
    chance, tail = average(LIKELY, SIGMAS), 2 * flipping(SIGMAS)
    passed = {
        flips: max(beyond(chance, n, flips * math.sqrt(n)) for n in (*range(1, 33), 64, 128)) for flips in (FLIPS, FLIPS / 2)
    }

    assert passed[FLIPS] <= tail < 1e-6 < passed[FLIPS / 2]
