"""Activation vocabulary as data: which exist, whether they are gated, which parameters they take, how halves are packed.

Source of the names and constants: the models of docs/contract.md (vLLM's activation names; transformers' modeling files).
The mathematics is in reference.oracle.activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from moeproof.reference.contract.errors import check, known


@dataclass(frozen=True)
class ActivationRow:
    """One row of the vocabulary. `defaults` are the parameters it takes; None means "must be given"."""

    gated: bool
    defaults: dict[str, float | None]
    interleaved: bool = False


_SWIGLUOAI: dict[str, float | None] = {"alpha": 1.702, "beta": 1.0, "limit": 7.0}

ACTIVATIONS: dict[str, ActivationRow] = {
    # gated: input (.., 2I) -> output (.., I); g is the gate half, u the up half
    "silu": ActivationRow(True, {"limit": 0.0}),  # silu(min(g,L)) * clamp(u,-L,L); limit 0 = no clamp
    "gelu": ActivationRow(True, {}),  # erf gelu(g) * u
    "gelu_tanh": ActivationRow(True, {}),
    "swigluoai": ActivationRow(True, _SWIGLUOAI, interleaved=True),  # g*sigmoid(alpha g)*(u+beta), both clamped first
    "swigluoai_uninterleave": ActivationRow(True, {"alpha": 1.702, "beta": 1.0, "limit": None}),
    "swiglustep": ActivationRow(True, {"limit": 7.0}),  # min(silu(g),L) * clamp(u,-L,L): clamped after silu
    "situ": ActivationRow(True, {"beta": None, "linear_beta": 0.0}),  # b*tanh(g/b)*sigmoid(g) * c*tanh(u/c)
    # ungated: width in = width out
    "silu_no_mul": ActivationRow(False, {}),
    "gelu_no_mul": ActivationRow(False, {}),
    "gelu_tanh_no_mul": ActivationRow(False, {}),
    "relu2_no_mul": ActivationRow(False, {}),  # relu(g)^2
    "relu_no_mul": ActivationRow(False, {}),
}

_REFUSED = {"relu2": "no model uses a gated relu2; the ungated one is relu2_no_mul"}


@dataclass(frozen=True)
class Activation:
    """An activation with its parameters. Prints as in a case line: `silu`, `silu:limit=7`, `situ:beta=4:linear_beta=25`.

    `interleaved` None takes the name's own packing: g0,u0,g1,u1,.. for swigluoai, halves (gate first) for all others.
    """

    name: str = "silu"
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    linear_beta: float | None = None
    interleaved: bool | None = None

    def __post_init__(self) -> None:
        check(self.name not in _REFUSED, f"activation '{self.name}' is refused: {_REFUSED.get(self.name)}")
        known("activation", self.name, ACTIVATIONS)
        row = ACTIVATIONS[self.name]
        for field in ("alpha", "beta", "limit", "linear_beta"):
            value = getattr(self, field)
            if field not in row.defaults:
                check(value is None, f"activation '{self.name}' takes no {field}; it takes {list(row.defaults) or 'none'}")
                continue
            default = row.defaults[field]
            check(
                value is not None or default is not None,
                f"activation '{self.name}' needs {field} (e.g. {self.name}:{field}=7)",
            )
            object.__setattr__(self, field, float(default if value is None else value))  # type: ignore[arg-type]
            check(getattr(self, field) >= 0, f"activation {field}={value} must not be negative")
        if self.name in ("swigluoai", "swigluoai_uninterleave", "swiglustep"):
            check(self.limit is not None and self.limit > 0, f"activation '{self.name}' needs limit > 0")
        if self.name == "situ":
            check(bool(self.beta), "activation 'situ' needs beta > 0")
        check(
            row.gated or self.interleaved is None or not self.interleaved,
            f"activation '{self.name}' is ungated: there are no halves to interleave",
        )
        object.__setattr__(self, "interleaved", row.interleaved if self.interleaved is None else self.interleaved)

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.name].gated

    def width_in(self, width_out: int) -> int:
        """Columns of the pre-activation for `width_out` columns of the result: twice as many where gated."""
        return 2 * width_out if self.gated else width_out

    def __str__(self) -> str:
        row = ACTIVATIONS[self.name]
        parts = [self.name]
        parts += [f"{k}={getattr(self, k):g}" for k, default in row.defaults.items() if getattr(self, k) != default]
        if self.interleaved != row.interleaved:
            parts.append("interleaved" if self.interleaved else "packed")
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> Activation:
        """The inverse of str(). Raises ContractError naming the part that is not understood."""
        name, *parts = text.split(":")
        options: dict[str, float | bool] = {}
        for part in parts:
            key, eq, value = part.partition("=")
            if part in ("interleaved", "packed"):
                options["interleaved"] = part == "interleaved"
                continue
            check(
                bool(eq) and key in ("alpha", "beta", "limit", "linear_beta"),
                f"activation option '{part}' is not known; allowed: alpha=, beta=, limit=, linear_beta=, interleaved, packed",
            )
            try:
                options[key] = float(value)
            except ValueError:
                check(False, f"activation option {key}='{value}' is not a number")
        return cls(name, **options)  # type: ignore[arg-type]
