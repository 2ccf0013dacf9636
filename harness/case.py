"""One case as one line of text: `str(case)` parses back to the same case.

The line is test id, reproducer, golden key and CI row at once. Only what differs from the default is printed:

    T=16,H=128,I=64,E=8,K=2,act=gelu,routing=zipf,seed=7
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.problem import PROBLEM_KEYS, Problem

VALUES = {
    "normal": "near-normal values scaled so that pre-activations and outputs have an rms near 1",
    "hetero": "normal, with magnitudes spread over 9 binades per token, channel and expert",
    "int": "small integers: every sum of GEMM1 is exact in float32, whatever its order",
    "sat": "saturated gate: gates are multiples of 128, so that silu and gelu are exact too, end to end",
    "groups": "normal, with magnitudes spread over 9 binades per token, channel, expert and group of 16 columns",
    "edges": "zero rows and blocks, and an amax at and next to powers of two and at the format's maximum, in every 16 columns",
    "ties": "x lies exactly between codes, where every spelling of a scale formula rounds its own way",
    "pin": "exact probe of a quantised scheme: every scale is a power of two, amax at the format's maximum, sums exact",
}
ROUTINGS = {
    "uniform": "K distinct experts per token, all equally likely",
    "zipf": "K distinct experts per token, expert e with weight 1/(e+1)",
    "hot": "every token's first slot goes to one expert",
    "empty": "first, middle and last expert get no token",
    "minus1": "a fifth of the slots is -1, and the last rows entirely",
    "dup": "tokens name an expert more than once",
    "none": "no slot is routed",
    "router": "ids and weights are what the oracle's router makes of the logits",
}
LOGITS = {
    "normal": "near-normal logits with standard deviation 2",
    "ties": "logits from five values, so that exact ties are common",
    "deep": "deeply negative logits: sigmoid scores underflow",
    "nan": "normal, with rows of NaN and infinite logits",
}
_RECIPES = {"values": VALUES, "routing": ROUTINGS, "logits": LOGITS}


@dataclass(frozen=True)
class Case:
    """A problem, the recipes its inputs are made by, and the seed."""

    problem: Problem
    values: str = "normal"
    routing: str = "uniform"
    logits: str = "normal"
    strided: bool = False
    """Every tensor argument arrives as a non-contiguous view."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, table in _RECIPES.items():
            known(field, getattr(self, field), table)
        check(isinstance(self.seed, int) and 0 <= self.seed < 2**63, f"seed={self.seed} must be an int in [0, 2^63)")
        if self.values in ("sat", "pin"):
            act = self.problem.act
            exact = act.name in ("silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_no_mul", "relu_no_mul", "gelu_tanh_no_mul")
            check(exact and not act.limit, f"values={self.values} needs an activation that saturates exactly; '{act}' does not")
        if self.values == "pin":
            p = self.problem
            check(p.quant.quantised, "values=pin pins scales: it needs a quantised scheme")
            check(p.dtype != "fp16", "values=pin leaves fp16's range: use bf16 or fp32")
            check(min(p.H, p.I) >= 16, f"values=pin needs 16 columns, H={p.H} and I={p.I}")
            check(not p.weight_on_input, "values=pin pins x itself: the weight cannot be on the input")
        if self.problem.routed_ids < self.problem.K:
            repeats = ("dup", "none", "router")
            check(
                self.routing in repeats, f"K > E names experts twice: routing={self.routing} cannot, use {', '.join(repeats)}"
            )
        if self.routing == "empty":
            check(self.problem.E - self.problem.K >= 3, "routing=empty leaves 3 experts without tokens: it needs E >= K + 3")

    def __str__(self) -> str:
        parts = [str(self.problem)]
        parts += [f"{f}={getattr(self, f)}" for f in _RECIPES if getattr(self, f) != _DEFAULTS[f]]
        if self.strided:
            parts.append("strided=1")
        return ",".join([*parts, f"seed={self.seed}"])

    def with_problem(self, **changes: object) -> Case:
        """The same case with some fields of its problem changed."""
        return replace(self, problem=replace(self.problem, **changes))  # type: ignore[arg-type]


_DEFAULTS = {f.name: f.default for f in fields(Case)}


def parse_case(line: str) -> Case:
    """The inverse of str(case). `model=NAME` at the start stands for a preset's problem; later keys override it.

    Raises ContractError naming what is wrong and what is allowed.
    """
    options: dict[str, str] = {}
    for part in line.strip().split(","):
        key, eq, value = part.partition("=")
        key = key.strip()
        check(
            bool(eq) and bool(key) and bool(value), f"'{part}' is not key=value (case lines look like T=16,H=128,I=64,E=8,K=2)"
        )
        check(key not in options, f"'{key}' is given twice in the case line")
        options[key] = value.strip()
    if "model" in options:
        from moeproof.harness.presets import preset  # presets are cases themselves

        base = preset(options.pop("model"))
        explicit = _split(str(base))
        options = explicit | options
    allowed = (*PROBLEM_KEYS, *_RECIPES, "strided", "seed")
    for key in options:
        known("case key", key, (*allowed, "model"))
    problem = Problem.from_options({k: v for k, v in options.items() if k in PROBLEM_KEYS})
    recipes: dict[str, object] = {k: options[k] for k in _RECIPES if k in options}
    if "strided" in options:
        check(options["strided"] in ("0", "1"), f"strided='{options['strided']}' is not 0 or 1")
        recipes["strided"] = options["strided"] == "1"
    if "seed" in options:
        check(options["seed"].isdecimal(), f"seed='{options['seed']}' is not a whole number >= 0")
        recipes["seed"] = int(options["seed"])
    return Case(problem, **recipes)  # type: ignore[arg-type]


def _split(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split(","))
