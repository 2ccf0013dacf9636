"""Router vocabulary as data: how logits become ids and weights. The mathematics is in reference.oracle.router."""

from __future__ import annotations

from dataclasses import dataclass

from moeproof.reference.contract.errors import check, known

SCORES = {
    "softmax": "softmax over all experts",
    "softmax_topk": "softmax over the K selected logits",
    "sigmoid": "sigmoid of each logit",
    "sqrtsoftplus": "sqrt(log(1 + exp(logit)))",
    "sparsemixer": "two rounds of masked softmax, K = 2 (docs/contract.md)",
}
RENORM = {
    "none": "weights are the scores",
    "sum": "divide by the sum, with no guard",
    "eps": "divide by the sum + value",
    "floor": "divide by max(sum, value)",
    "lp": "divide by the L_p norm, p = value",
}
GROUP_SCORES = {"max": "best (biased) score of the group", "top2": "sum of its two best (biased) scores"}
REJECTED = {"neginf": "experts of rejected groups get -inf", "zero": "experts of rejected groups get 0"}


@dataclass(frozen=True)
class Router:
    """How ROUTE turns logits_TE into ids_TK and weights_TK, in this order:

    logits * multiplier, then softcap * tanh(logits / softcap); score; + correction bias (selection only); group selection;
    top-K (lowest expert id wins a tie); weight = unbiased score of the selected; renormalise; * scale; * per-expert scale.
    Prints as in a case line, e.g. `sigmoid:bias:groups=8/4:top2:renorm=eps/1e-20:scale=2.5`.
    """

    score: str = "softmax"
    bias: bool = False
    """A correction bias per expert is added to the score for selection only, never to the weight."""
    groups: int = 0
    """Number of expert groups, 0 = no grouping."""
    keep: int = 0
    """Groups kept by their group score; 0 with groups > 0 means a fixed quota of K/groups experts from every group."""
    group_score: str = "max"
    rejected: str = "neginf"
    renorm: str = "none"
    renorm_value: float = 0.0
    scale: float = 1.0
    """Routed scaling factor: multiplies the weights exactly once, after renormalising; never the shared expert."""
    multiplier: float = 1.0
    softcap: float = 0.0
    expert_scale: bool = False
    """A learned factor per expert, gathered by id and multiplied after renormalising."""
    table: bool = False
    """Ids come from a token-id table; weights are still the scores at those ids."""
    zero_experts: int = 0
    """Identity experts E..E+Z-1 that take part in the scoring; a slot routed to one contributes weight * input."""
    fused_shared: int = 0
    """Shared experts appended as ids E..E+n-1 in extra slots after renormalising, each with weight 1 (never scaled)."""
    jitter_eps: float = 0.01
    """sparsemixer's threshold."""

    def __post_init__(self) -> None:
        known("router score", self.score, SCORES)
        known("router renorm", self.renorm, RENORM)
        known("router group score", self.group_score, GROUP_SCORES)
        known("router rejected rule", self.rejected, REJECTED)
        check(self.groups >= 0 and self.keep >= 0, "router groups and keep must not be negative")
        check(self.keep <= self.groups, f"router keeps {self.keep} of {self.groups} groups; keep must be <= groups")
        if self.renorm in ("eps", "floor", "lp"):
            check(
                self.renorm_value > 0,
                f"router renorm={self.renorm} needs a value > 0 (e.g. renorm={self.renorm}/1e-20)",
            )
        else:
            check(self.renorm_value == 0.0, f"router renorm={self.renorm} takes no value")
        check(self.softcap >= 0, f"router softcap={self.softcap} must not be negative")
        check(self.zero_experts >= 0 and self.fused_shared >= 0, "zero_experts and fused_shared must not be negative")
        check(not (self.zero_experts and self.fused_shared), "zero experts and fused shared experts share the ids after E")
        if self.score == "sparsemixer":
            plain = not (self.bias or self.groups or self.table or self.zero_experts) and self.renorm == "none"
            check(plain, "sparsemixer takes no bias, groups, table, zero experts or renorm")
        if self.score == "softmax_topk":
            check(not self.groups and not self.bias, "softmax_topk selects by logit: it takes no groups and no bias")

    def __str__(self) -> str:
        parts = [self.score]
        parts += [name for name in ("bias", "expert_scale", "table") if getattr(self, name)]
        if self.groups:
            parts.append(f"groups={self.groups}/{self.keep}")
        if self.group_score != "max":
            parts.append(self.group_score)
        if self.rejected != "neginf":
            parts.append(f"rejected={self.rejected}")
        if self.renorm != "none":
            parts.append(f"renorm={self.renorm}" + (f"/{self.renorm_value:g}" if self.renorm_value else ""))
        for name, default in (("scale", 1.0), ("multiplier", 1.0), ("softcap", 0.0), ("jitter_eps", 0.01)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name):g}")
        for name in ("zero_experts", "fused_shared"):
            if getattr(self, name):
                parts.append(f"{name}={getattr(self, name)}")
        return ":".join(parts)

    @classmethod
    def parse(cls, text: str) -> Router:
        """The inverse of str(). Raises ContractError naming the part that is not understood."""
        score, *parts = text.split(":")
        options: dict[str, object] = {}
        for part in parts:
            key, eq, value = part.partition("=")
            try:
                if part in ("bias", "expert_scale", "table"):
                    options[part] = True
                elif part in GROUP_SCORES:
                    options["group_score"] = part
                elif key == "groups" and eq:
                    groups, _, keep = value.partition("/")
                    options["groups"], options["keep"] = int(groups), int(keep)
                elif key == "renorm" and eq:
                    rule, slash, amount = value.partition("/")
                    options["renorm"] = rule
                    if slash:
                        options["renorm_value"] = float(amount)
                elif key == "rejected" and eq:
                    options["rejected"] = value
                elif key in ("scale", "multiplier", "softcap", "jitter_eps") and eq:
                    options[key] = float(value)
                elif key in ("zero_experts", "fused_shared") and eq:
                    options[key] = int(value)
                else:
                    raise KeyError(part)
            except KeyError:
                allowed = "bias, expert_scale, table, groups=G/KEEP, max, top2, rejected=, renorm=, scale=, multiplier=, "
                check(
                    False,
                    f"router option '{part}' is not known; allowed: {allowed}softcap=, zero_experts=, fused_shared=",
                )
            except ValueError:
                check(False, f"router option '{part}' has a value that is not a number")
        return cls(score, **options)  # type: ignore[arg-type]
