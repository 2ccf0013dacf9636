"""The layer read one number at a time: Python floats (float64), exact fractions for rounding, no tensor operation.

Dims: T tokens, K slots, H hidden, I intermediate, N = 2I or I. A slot is live where its expert's weights are here; tables
of slots are dicts {(t, k): row} with live slots only.
"""

from __future__ import annotations

import math
from fractions import Fraction

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.placement import local_experts
from moeproof.reference.contract.schemes import Format

Row = list[float]
Slots = dict[tuple[int, int], Row]


def rounded(x: float, fmt: Format) -> float:
    """IEEE 754-2019 section 4.3.1: nearest, ties to even, subnormals kept, overflow to infinity, sign of zero kept."""
    if x == 0 or math.isinf(x) or math.isnan(x):
        return x
    exponent = math.frexp(x)[1] - 1
    step = Fraction(2) ** (max(exponent, fmt.emin) - fmt.bits)
    steps = abs(Fraction(x)) / step
    whole = steps.numerator // steps.denominator
    rest = steps - whole
    if rest > Fraction(1, 2) or (rest == Fraction(1, 2) and whole % 2 == 1):
        whole += 1
    result = whole * step
    largest = (2 - Fraction(2) ** -fmt.bits) * Fraction(2) ** fmt.emax
    return math.copysign(math.inf if result > largest else float(result), x)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def silu(x: float) -> float:
    return x * sigmoid(x)


def gelu(x: float) -> float:
    return 0.5 * x * math.erfc(-x / math.sqrt(2))


def gelu_tanh(x: float) -> float:
    """0.5 x (1 + tanh z), with 1 + tanh z = 2 s(2z): the negative tail keeps its relative accuracy."""
    z = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * sigmoid(2 * z)


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


UNGATED = {
    "silu_no_mul": silu,
    "gelu_no_mul": gelu,
    "gelu_tanh_no_mul": gelu_tanh,
    "relu_no_mul": lambda x: max(x, 0.0),
    "relu2_no_mul": lambda x: max(x, 0.0) ** 2,
}


def gated(g: float, u: float, a: Activation) -> float:
    """One gated result, by the table of docs/contract.md."""
    if a.name == "silu":
        if a.limit:
            g, u = min(g, a.limit), clamp(u, -a.limit, a.limit)
        return silu(g) * u
    if a.name == "gelu":
        return gelu(g) * u
    if a.name == "gelu_tanh":
        return gelu_tanh(g) * u
    if a.name in ("swigluoai", "swigluoai_uninterleave"):
        g, u = min(g, a.limit), clamp(u, -a.limit, a.limit)
        return g * sigmoid(a.alpha * g) * (u + a.beta)
    if a.name == "swiglustep":
        return min(silu(g), a.limit) * clamp(u, -a.limit, a.limit)
    if a.name == "situ":
        up = a.linear_beta * math.tanh(u / a.linear_beta) if a.linear_beta else u
        return a.beta * math.tanh(g / a.beta) * sigmoid(g) * up
    raise KeyError(a.name)


def activated(row: Row, a: Activation) -> Row:
    if not a.gated:
        return [UNGATED[a.name](x) for x in row]
    width = len(row) // 2
    pairs = [(row[2 * i], row[2 * i + 1]) if a.interleaved else (row[i], row[width + i]) for i in range(width)]
    return [gated(g, u, a) for g, u in pairs]


def times(row: Row, weight: list[Row], bias: Row | None = None) -> Row:
    """row (A,) times weight (B, A), plus bias (B,)."""
    out = [math.fsum(a * w for a, w in zip(row, ws, strict=True)) for ws in weight]
    return out if bias is None else [y + b for y, b in zip(out, bias, strict=True)]


class Layer:
    """The tensors of one case as nested lists, and the stages as loops over tokens and slots."""

    def __init__(self, inputs: Inputs) -> None:
        self.p = inputs.problem
        self.data = {name: t.tolist() for name, t in inputs.tensors()}
        home = local_experts(self.p.weight_experts, self.p.ep, self.p.ep_rank, self.p.placement)
        self.home = {expert: local for local, expert in enumerate(home)}
        self.live = {
            (t, k): self.home[e] for t, row in enumerate(self.data["topk_ids"]) for k, e in enumerate(row) if e in self.home
        }

    def weight(self, t: int, k: int) -> float:
        return self.data["topk_weights"][t][k]

    def source(self) -> list[Row]:
        """What enters the experts, before any weight: x, or its projection into the latent width."""
        x = self.data["hidden_states"]
        return [times(row, self.data["latent_down"]) for row in x] if self.p.latent else x

    def gate_up(self) -> Slots:
        source, out = self.source(), {}
        for (t, k), e in self.live.items():
            row = source[t]
            if self.p.weight_on_input:
                row = [rounded(v * self.weight(t, k), self.p.fmt) for v in row]
            out[t, k] = times(row, self.data["w1"][e], self.data["b1"][e] if self.p.expert_bias else None)
        return out

    def h(self, gate_up: Slots) -> Slots:
        return {at: activated(row, self.p.act) for at, row in gate_up.items()}

    def y(self, h: Slots) -> Slots:
        bias = self.data.get("b2")
        return {at: times(row, self.data["w2"][self.live[at]], bias and bias[self.live[at]]) for at, row in h.items()}

    def routed(self, y: Slots) -> list[Row]:
        """Sum over live slots of w * y and over identity slots of w * x, times the scale on the sum."""
        total = [[0.0] * self.p.hidden for _ in range(self.p.T)]
        for t, ids in enumerate(self.data["topk_ids"]):
            for k, e in enumerate(ids):
                if (t, k) in self.live:
                    w = 1.0 if self.p.weight_on_input else self.weight(t, k)
                    terms = [w * v for v in y[t, k]]
                elif self.p.E <= e < self.p.E + self.p.router.zero_experts:
                    terms = [self.weight(t, k) * v for v in self.data["hidden_states"][t]]
                else:
                    continue
                total[t] = [a + b for a, b in zip(total[t], terms, strict=True)]
        return [[v * self.p.scale_on_sum for v in row] for row in total]

    def out(self, routed: list[Row]) -> list[Row]:
        """Out of the latent width, and the shared expert on top."""
        out = []
        for t, row in enumerate(routed):
            if self.p.latent:
                if self.p.latent_norm:
                    scale = 1 / math.sqrt(math.fsum(v * v for v in row) / len(row) + 1e-6)
                    row = [v * scale * g for v, g in zip(row, self.data["latent_norm"], strict=True)]
                row = times(row, self.data["latent_up"])
            if self.p.shared:
                x = self.data["hidden_states"][t]
                gate = 1.0
                if self.p.shared_gate:
                    gate = sigmoid(math.fsum(a * b for a, b in zip(x, self.data["shared_gate"], strict=True)))
                add = times(activated(times(x, self.data["shared_w1"]), self.p.act), self.data["shared_w2"])
                row = [a + gate * b for a, b in zip(row, add, strict=True)]
            out.append(row)
        return out
