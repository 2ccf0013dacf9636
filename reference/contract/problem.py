"""The mathematics of one MoE layer call: sizes, vocabulary, flags. No seed, no tensors."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from moeproof.reference.contract.activations import Activation
from moeproof.reference.contract.errors import ContractError, check, known
from moeproof.reference.contract.placement import PLACEMENTS, local_experts
from moeproof.reference.contract.router import Router
from moeproof.reference.contract.schemes import FORMATS, SCHEMES, Format, QuantScheme

DTYPES = ("bf16", "fp16", "fp32")
LAYOUTS = {
    "standard": "one row per (token, slot), in any order",
    "batched": "(e, max_tokens, H): one region per local expert, valid rows first",
}
STORAGES = {
    "NK": "w1 (E, N, H) and w2 (E, H, I), contiguous",
    "KN": "stored as (E, H, N) and (E, I, H); the candidate gets transposed, strided views",
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One MoE layer call. Letters: T tokens, K slots per token, E experts, H hidden, I intermediate.

    Refuses impossible combinations with a message naming the field and the rule (ContractError).
    """

    T: int
    H: int
    I: int  # noqa: E741  (the field's letter)
    E: int
    K: int
    dtype: str = "bf16"
    scheme: str = "none"
    act: Activation = field(default_factory=Activation)
    router: Router = field(default_factory=Router)
    expert_bias: bool = False
    weight_on_input: bool = False
    scale_on_sum: float = 1.0
    """Routed scaling factor applied to the routed sum instead of the weights (before the shared expert is added)."""
    shared: int = 0
    """Width of the shared expert (after multiplying by their number), 0 = none. Same activation as the experts."""
    shared_gate: bool = False
    """The shared expert's output is multiplied by sigmoid(x . w)."""
    latent: int = 0
    """Latent width of the experts (linear projections around them), 0 = none."""
    latent_norm: bool = False
    """RMSNorm of the routed sum in the latent width, before the up-projection."""
    layout: str = "standard"
    capacity: int = 0
    """Rows per expert of the batched layout; 0 = T * K, which cannot overflow."""
    storage: str = "NK"
    ep: int = 1
    ep_rank: int = 0
    placement: str = "linear"
    inplace: bool = False

    def __post_init__(self) -> None:
        for name in ("T", "shared", "latent", "capacity"):
            check(
                _is_int(getattr(self, name)) and getattr(self, name) >= 0,
                f"{name}={getattr(self, name)} must be an int >= 0",
            )
        for name in ("H", "I", "E", "K"):
            check(
                _is_int(getattr(self, name)) and getattr(self, name) >= 1,
                f"{name}={getattr(self, name)} must be an int >= 1",
            )
        known("dtype", self.dtype, DTYPES)
        known("scheme", self.scheme, SCHEMES)
        known("layout", self.layout, LAYOUTS)
        known("storage", self.storage, STORAGES)
        known("placement", self.placement, PLACEMENTS)
        check(
            self.routed_ids >= self.K or self.router.table,
            f"K={self.K} slots per token but only {self.routed_ids} experts; K must be <= E (+ zero experts)",
        )
        self._check_router()
        check(
            not (self.weight_on_input and self.slots != 1),
            f"weight_on_input with K={self.slots}: the weight can multiply the input only when every token has one slot (K=1)",
        )
        check(not (self.latent_norm and not self.latent), "latent_norm needs latent > 0")
        check(not (self.shared_gate and not self.shared), "shared_gate needs shared > 0")
        check(not (self.capacity and self.layout != "batched"), "capacity belongs to layout=batched")
        check(self.ep >= 1 and 0 <= self.ep_rank < self.ep, f"ep_rank={self.ep_rank} is not in [0, ep={self.ep})")
        check(self.ep <= self.weight_experts, f"ep={self.ep} ranks share {self.weight_experts} experts; ep must be <= E")
        check(
            not (self.inplace and self.latent),
            "inplace with a latent projection: sizes of input and output differ inside",
        )
        check(
            not (self.latent and self.router.zero_experts),
            "latent with zero experts: an identity expert adds x, H wide, to a sum in the latent width",
        )
        check(
            not (self.latent and self.quant.quantised),
            f"latent with scheme={self.scheme}: QUANT1 would quantise the projection's result, which no stage shows",
        )
        self.quant.check_sizes(self.hidden, self.I, self.N)

    def _check_router(self) -> None:
        r = self.router
        check(r.score != "sparsemixer" or self.K == 2, f"sparsemixer selects 2 experts; K={self.K}")
        if not r.groups:
            return
        check(self.routed_ids % r.groups == 0, f"E={self.routed_ids} experts do not divide into groups={r.groups}")
        per_group = self.routed_ids // r.groups
        if not r.keep:
            check(self.K % r.groups == 0, f"a quota from every group needs K={self.K} divisible by groups={r.groups}")
        candidates = per_group * (r.keep or r.groups)
        check(candidates >= self.K, f"K={self.K} slots but only {candidates} experts in the {r.keep} kept groups")
        check(r.group_score != "top2" or per_group >= 2, f"group score top2 needs 2 experts per group, not {per_group}")

    @property
    def routed_ids(self) -> int:
        """Ids the router can choose: E experts and the zero (identity) experts after them."""
        return self.E + self.router.zero_experts

    @property
    def weight_experts(self) -> int:
        """Experts that own weights: E and the fused shared experts after them."""
        return self.E + self.router.fused_shared

    @property
    def named_ids(self) -> int:
        """Ids below this stand for an expert, with weights or identity; any other is no more routed than -1."""
        return max(self.routed_ids, self.weight_experts)

    @property
    def slots(self) -> int:
        """Slots per token after routing: K and one for each fused shared expert."""
        return self.K + self.router.fused_shared

    @property
    def hidden(self) -> int:
        """Width the experts see: the latent width where there is one."""
        return self.latent or self.H

    @property
    def N(self) -> int:
        """Rows of w1: 2I where the activation is gated, else I."""
        return self.act.width_in(self.I)

    @property
    def local(self) -> list[int]:
        """Global ids of the experts whose weights this rank holds."""
        return local_experts(self.weight_experts, self.ep, self.ep_rank, self.placement)

    @property
    def rows_per_expert(self) -> int:
        """Rows of each expert's region in the batched layout."""
        return self.capacity or max(self.T * self.slots, 1)

    @property
    def fmt(self) -> Format:
        """Format of x, the weights and the output."""
        return FORMATS[self.dtype]

    @property
    def quant(self) -> QuantScheme:
        return SCHEMES[self.scheme]

    def __str__(self) -> str:
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in ("T", "H", "I", "E", "K") or value != _DEFAULTS[f.name]:
                parts.append(f"{f.name}={_to_text(value)}")
        return ",".join(parts)

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Problem:
        """Build from the key=value pairs of a case line. Raises ContractError naming a key or value that is wrong."""
        missing = [k for k in ("T", "H", "I", "E", "K") if k not in options]
        check(not missing, f"the case line lacks {', '.join(missing)}; T, H, I, E and K are always needed")
        values: dict[str, object] = {}
        for key, text in options.items():
            known("case key", key, _TYPES)
            values[key] = _from_text(key, text)
        return cls(**values)  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _to_text(value: object) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


_DEFAULTS: dict[str, object] = {
    f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(Problem)
}
_TYPES: dict[str, type] = {
    f.name: int if f.name in ("T", "H", "I", "E", "K") else type(_DEFAULTS[f.name]) for f in fields(Problem)
}
PROBLEM_KEYS = tuple(_TYPES)


def _from_text(key: str, text: str) -> object:
    kind = _TYPES[key]
    try:
        if kind is bool:
            return {"1": True, "0": False}[text]
        if kind is Activation:
            return Activation.parse(text)
        if kind is Router:
            return Router.parse(text)
        return kind(text)
    except ContractError:
        raise
    except (ValueError, KeyError):
        allowed = {bool: "0 or 1", int: "an int", float: "a number"}.get(kind, "understood")
        raise ContractError(f"{key}='{text}' is not {allowed}") from None
