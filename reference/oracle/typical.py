"""How large the error of a correct product is as a rule: root mean squares, where bounds.py and products.py say how large it
may be at most. No element is judged by them; they say how many roundings of a whole tensor may go the wrong way.

Partial sums of n steps from 0 to y are taken for a walk that ends at y (a Brownian bridge): over the steps their mean square
is y^2 / 3 + Q / 6, Q = sum x^2 w^2, and Q / n more for what one step brings before it is added. What is cut off below a
quantum q loses q / 2 toward zero. q is a power of two at or below the largest operand M, 0.72 of it on average (1 / (2 ln 2):
mantissas spread evenly in logs, after Benford). The losses of the products of a step have their signs, and cancel but for the
share |y| / S of them. What loses toward zero adds up along the sum; what has no sign in common walks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter

import torch

from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.formats import Format
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.tensor_cores import PROMOTED, TENSOR_CORES
from moeproof.reference.oracle.bounds import LEAST, U32, U64
from moeproof.reference.oracle.experts import by_expert, local_ids
from moeproof.reference.oracle.products import CUT, STEP, U_FP8, Operand, accumulator_class, decoded, plain
from moeproof.reference.oracle.quant_stages import weight
from moeproof.reference.oracle.rounding import round_to

Tensor = torch.Tensor
MEAN = 1 / (2 * math.log(2))
"""Mean of the largest power of two in a number, over the number."""
MEAN_SQUARE = 3 / (8 * math.log(2))
STEP_16BIT, FRACTION = min((c.step, c.fraction) for c in TENSOR_CORES if c.operands == "bf16, fp16" and c.fraction)
"""16-bit products that a tensor core adds at a time, and the bits it keeps: of those known, the core that cuts most often."""
U_TF32 = 2.0**-10


class Walk:
    """One sum of products, (rows of x, rows of w) float64: y, Q and what share of its terms has a sign in common."""

    def __init__(self, x: Operand, w: Operand) -> None:
        self.x, self.w, self.length = x, w, x.values.shape[-1]
        self.y = x.values @ w.values.T
        self.S = x.values.abs() @ w.values.abs().T
        self.Q = x.values**2 @ (w.values**2).T
        self.common = self.y.abs() / self.S.clamp(min=LEAST)

    def reach(self, steps: int) -> Tensor:
        """Root mean square of the partial sums over `steps` steps."""
        return (self.y**2 / 3 + self.Q * (1 / 6 + 1 / steps)).sqrt()


def _float32(s: Walk) -> Tensor:
    """A rounding to nearest after every product, uniform in half a unit of float32; for 16-bit operands also what a tensor
    core cuts off in each step: half a unit of the partial sum, and half a quantum of the partial sum and of each product.
    """
    rounded = U32 * math.sqrt(s.length * MEAN_SQUARE / 3) * s.reach(s.length)
    if s.x.fmt.name == "fp32":
        return rounded
    steps = math.ceil(s.length / STEP_16BIT)
    lost = U32 + 2.0 ** -(FRACTION + 1) * (1 + STEP_16BIT * s.common)
    return torch.hypot(rounded, steps * MEAN * lost * s.reach(steps))


def _tf32(s: Walk) -> Tensor:
    """Both operands lose half a unit of 10 bits on average, all of y together, and a twelfth of its square about that. A unit
    is taken for 2^-10 of the operand, as it is just above a power of two: few operands average nothing out.
    """
    return torch.hypot(_float32(s), U_TF32 * (s.y**2 + s.Q / 6).sqrt())


def _int32(s: Walk) -> Tensor:
    groups = max(s.x.groups, s.w.groups)
    return U32 * math.sqrt(groups * MEAN_SQUARE / 3 if groups > 1 else 0) * s.reach(groups)


def _promoted(s: Walk) -> Tensor:
    """Blocks of 128 from zero, M^2 as in products.py: 7/32 y_b^2 + 13/32 Q_b. A block's products lose 64 |y| / S quanta at the
    sign of y, its partial sum half a quantum in three steps at the sign of y_b: together where blocks agree, a walk elsewhere.
    """
    x, w = (o.values.split(PROMOTED, dim=-1) for o in (s.x, s.w))
    sums = [a @ b.T for a, b in zip(x, w, strict=True)]
    nothing = torch.zeros_like(s.y)
    squares = 7 / 32 * sum((y**2 for y in sums), start=nothing) + 13 / 32 * s.Q
    agree = s.y.abs() / sum((y.abs() for y in sums), start=nothing).clamp(min=LEAST)
    together = MEAN * (PROMOTED / 2 * s.common + 1.5 * agree) * (len(sums) * squares).sqrt()
    apart = ((4 * CUT + (1.5 * MEAN) ** 2) * squares).sqrt()
    return torch.hypot(U_FP8 * torch.hypot(together, apart), U32 * math.sqrt(len(sums)) * s.reach(len(sums)))


def _unpromoted(s: Walk) -> Tensor:
    """n = K/32 steps into one sum: half a quantum each for the partial sum and for 32 |y| / S of its products."""
    steps = math.ceil(s.length / STEP)
    together = steps * MEAN * (0.5 + STEP / 2 * s.common)
    return U_FP8 * s.reach(steps) * torch.hypot(together, torch.full_like(together, math.sqrt(steps * CUT)))


TYPICAL: dict[str, Callable[[Walk], Tensor]] = {
    "fp32": _float32,
    "tf32": _tf32,
    "int32": _int32,
    "fp8_promoted": _promoted,
    "fp8_unpromoted": _unpromoted,
}
"""By accumulator class. A sum whose every partial sum is rounded to the dtype is not here: its bound is all that is known."""


def product(x: Operand, w: Operand, dtype: Format, claims: Claims, bias: Tensor | None = None) -> Tensor:
    """float64 (rows of x, rows of w): root mean square of the error of x w^T (+ bias). Infinite where it is not known."""
    if claims.decode == "dtype" and not x.quantised:
        w = Operand(round_to(w.values, dtype), dtype)
    s = Walk(x, w)
    kind = accumulator_class(x.fmt, w.fmt, claims)
    if kind not in TYPICAL:
        return torch.full_like(s.y, torch.inf)
    # Six roundings of the sum and what is added to it; four of each partial sum that scales of its own bring.
    after = 6 * (s.y**2 + (0 if bias is None else bias.double() ** 2))
    scaled = 4 * s.Q if max(x.groups, w.groups) > 1 else 0
    scales = U32 * ((after + scaled) * MEAN_SQUARE / 3).sqrt()
    # The oracle's own sum is off by this. Where the terms cancel, to zero in integers, it is all that its y consists of.
    return torch.hypot(torch.hypot(TYPICAL[kind](s), scales), U64 * math.sqrt(s.length) * s.S)


def grouped(inputs: Inputs, name: str, rows_TKA: Operand, claims: Claims) -> Tensor:
    """float64 (T, K, width): of GEMM1 (`name` w1) or GEMM2 (w2) of the rows as they are multiplied. 0 where not live."""
    p, local = inputs.problem, local_ids(inputs)
    weights, biases = (inputs.w1, inputs.b1) if name == "w1" else (inputs.w2, inputs.b2)
    width = p.N if name == "w1" else p.hidden
    size = torch.zeros(*local.shape, width, dtype=torch.float64, device=inputs.device)
    for expert, tokens, slots in by_expert(local, inputs.w1.shape[0]):
        w = decoded(weight(inputs, name, expert)) if p.quant.quantised else plain(weights[expert], p.fmt)
        bias = None if biases is None else biases[expert]
        size[tokens, slots] = product(rows_TKA.over(itemgetter((tokens, slots))), w, p.fmt, claims, bias)
    return size
