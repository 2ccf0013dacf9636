"""One case as one line of text: `str(case)` parses back to the same case.

The line is test id, reproducer, golden key and CI row at once. Only what differs from the default is printed:

    T=16,H=128,I=64,E=8,K=2,act=gelu,routing=zipf,seed=7
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from moeproof.harness.cases.spread import SPREADS, spread_tokens
from moeproof.reference.contract.errors import check, known
from moeproof.reference.contract.grid import Grid
from moeproof.reference.contract.problem import PROBLEM_KEYS, Problem
from moeproof.reference.contract.world import World

VALUES = {
    "normal": "near-normal values scaled so that pre-activations and outputs have an rms near 1",
    "hetero": "normal, with magnitudes spread over 9 binades per token, channel and expert",
    "int": "small integers: every sum of GEMM1 is exact in float32, whatever its order",
    "sat": "saturated gate: gates are multiples of 128, so that silu and gelu are exact too, end to end",
    "tagged": "payloads that spell token and expert, exact end to end: whatever is misplaced says where it belongs",
    "wide": "integers of one sign: sums of GEMM1 are exact in float32 and need 12 to 17 bits",
    "cancel": "experts in pairs whose outputs cancel in every second column",
    "asym": "normal, with scales that differ along every axis, so that every swap shows",
    "clamp": "pre-activations far beyond the activation's limit, on both sides",
    "tail": "gates of -3 to -4, where the two gelus differ by a quarter",
    "sweep": "every bit pattern of a 16-bit gate, I to a token: T * I = 2^17 holds each with two up values",
    "groups": "normal, with magnitudes spread over 9 binades per token, channel, expert and group of 16 columns",
    "experts": "groups, with w1 of experts spread over 9 binades and w2 over 17, so that all count in the sum",
    "edges": "zero rows and blocks, and an amax at and next to powers of two and at the format's maximum, in every 16 columns",
    "ties": "x lies exactly between codes, where every spelling of a scale formula rounds its own way",
    "codes": "x holds every code, every midpoint of two and both neighbours of each, under an amax that makes scales exact",
    "pin": "exact probe of a quantised scheme: every scale is a power of two, amax at the format's maximum, sums exact",
    "least": "exact probe of e8m0 scales: groups of x, w1 and w2 whose scale is the least there is, 2^-127, stored as code 0",
}
ROUTINGS = {
    "uniform": "K distinct experts per token, all equally likely",
    "zipf": "K distinct experts per token, expert e with weight 1/(e+1)",
    "hot": "every token's first slot goes to one expert",
    "empty": "first, middle and last expert get no token",
    "minus1": "a fifth of the slots is -1, and the last rows entirely",
    "dup": "tokens name an expert more than once",
    "none": "no slot is routed",
    "tile": "tokens per expert at multiples of 16, one more and one less",
    "pair": "every token names two neighbouring experts, far above their share",
    "hot_first": "every token's first slot goes to the first expert",
    "hot_middle": "every token's first slot goes to the middle expert",
    "hot_last": "every token's first slot goes to the last expert",
    "trailing": "the second half of the rows is -1 entirely",
    "beyond": "a fifth of the slots names an id that no expert has: to be refused, or ignored like -1",
    "router": "ids and weights are what the oracle's router makes of the logits",
}
LOGITS = {
    "normal": "near-normal logits with standard deviation 2",
    "ties": "logits from five values, so that exact ties are common",
    "deep": "deeply negative logits: sigmoid scores underflow",
    "nan": "normal, with rows of NaN and infinite logits",
}
RELATIONS = {
    "none": "no metamorphic relation",
    "permute": "tokens in another order give the same rows in that order",
    "duplicate": "a batch of every token twice gives every row twice",
    "split": "two halves of the batch give the two halves of the result",
    "relabel": "experts under other numbers give the same result",
    "flip": "slots in reverse order give the same result, up to the order of a sum",
    "double": "weights times two give twice the result, bit for bit",
    "ranks": "the tokens of each rank on another rank give the same rows there (several ranks)",
}
HISTORIES = {
    "none": "nothing happens between the calls",
    "interleave": "other cases run between two calls, which must agree",
    "stream": "the call runs on a side stream while the default stream is busy (GPU)",
    "graph": "the call is captured, and replayed with other inputs and allocator churn (GPU; on CPU ranks, called again)",
}
_RECIPES = {
    "values": VALUES,
    "routing": ROUTINGS,
    "logits": LOGITS,
    "spread": SPREADS,
    "relation": RELATIONS,
    "history": HISTORIES,
}
_WORLD = ("ranks", "tp", "sp", "redundant")
"""Numbers of a case on several ranks; a single-rank line has none of them."""
_FLAGS = ("strided", "huge")
SATURATING = ("silu", "gelu", "gelu_tanh", "silu_no_mul", "gelu_no_mul", "gelu_tanh_no_mul")
"""Activations that are exact, given limit 0, where the gate is 0, >= 32 or <= -128."""


@dataclass(frozen=True)
class Case:
    """A problem, the recipes its inputs are made by, and the seed."""

    problem: Problem
    values: str = "normal"
    routing: str = "uniform"
    logits: str = "normal"
    ranks: int = 1
    """T tokens and E experts are those of all ranks together: with ranks=1 it is the same layer on one rank."""
    spread: str = "even"
    """How the tokens are shared among the ranks (without sp: among the tensor-parallel groups)."""
    tp: int = 1
    """Tensor-parallel shards of I; ranks = tp times the expert-parallel groups."""
    sp: int = 0
    """1: the tokens of a tensor-parallel group are split among its ranks; 0: each of them holds all."""
    redundant: int = 0
    """Physical experts beyond one per expert (reference.contract.grid)."""
    relation: str = "none"
    """A metamorphic relation that is checked as well."""
    history: str = "none"
    """What happens around the call."""
    strided: bool = False
    """Every tensor argument arrives as a non-contiguous view."""
    huge: bool = False
    """Rows of x and experts of w1 and w2 lie more than 2^31 elements apart, from first to last (GPU, 60 GB)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for field, table in _RECIPES.items():
            known(field, getattr(self, field), table)
        check(isinstance(self.seed, int) and 0 <= self.seed < 2**63, f"seed={self.seed} must be an int in [0, 2^63)")
        check(self.sp in (0, 1), f"sp={self.sp} must be 0 or 1")
        if self.ranks == 1:
            for key in ("spread", "tp", "sp", "redundant"):
                check(getattr(self, key) == getattr(type(self), key), f"{key}={getattr(self, key)} needs ranks > 1")
        else:
            _ = self.world  # for its refusals
        self._check_values()
        self._check_routing()
        self._check_relation()
        both = self.huge and (self.strided or self.problem.storage == "KN")
        check(not both, "huge=1 sets the strides itself: it goes with neither strided=1 nor storage=KN")

    def _check_values(self) -> None:
        p, act = self.problem, self.problem.act
        if self.values in ("sat", "tagged", "pin", "least"):
            exact = act.name in (*SATURATING, "relu_no_mul") and not act.limit
            check(exact, f"values={self.values} needs an activation that saturates exactly; '{act}' does not")
        if self.values == "tagged":
            check(p.H > 1, "values=tagged needs H > 1")
        if self.values == "pin":
            check(p.quant.quantised, "values=pin pins scales: it needs a quantised scheme")
            check(p.dtype != "fp16", "values=pin leaves fp16's range: use bf16 or fp32")
            check(min(p.H, p.I) >= 16, f"values=pin needs 16 columns, H={p.H} and I={p.I}")
            check(not p.weight_on_input, "values=pin pins x itself: the weight cannot be on the input")
        if self.values == "least":
            powers = [q is not None and q.scale == "e8m0" for q in (p.quant.w, p.quant.a1 or p.quant.w)]
            check(all(powers), f"values=least needs e8m0 scales of the weights and of x; scheme {p.scheme} has others")
            check(act.gated, f"values=least makes faint up values: it needs a gated activation, not '{act}'")
            check(p.dtype != "fp16", "values=least leaves fp16's range: use bf16 or fp32")
            check(min(p.H, p.I) >= 96, f"values=least needs three groups of 32 columns, H={p.H} and I={p.I}")
            check(not p.weight_on_input, "values=least places x itself: the weight cannot be on the input")
        if self.values == "codes":
            q = p.quant.a1
            check(q is not None and not (q.static or q.two_level), "values=codes needs a scheme that scales x by its own amax")
            check(not p.weight_on_input, "values=codes places x itself: the weight cannot be on the input")
        if self.values == "cancel":
            check(p.K > 1 and p.E > 1, "values=cancel needs K > 1 slots and E > 1 experts to cancel")
        if self.values == "clamp":
            check(bool(act.limit), f"values=clamp needs an activation with a limit; '{act}' has none")
        if self.values == "tail":
            check(act.name.startswith("gelu"), f"values=tail is for the gelus, not '{act}'")
            check(not p.weight_on_input, "values=tail places the gates itself: the weight cannot be on the input")
        if self.values == "sweep":
            plain = p.E == p.K == p.slots == 1 and not (p.expert_bias or p.shared or p.latent or p.router.zero_experts)
            check(plain and p.scale_on_sum == 1, "values=sweep needs a plain layer of one expert: E=1,K=1")
            check(p.dtype != "fp32", "values=sweep enumerates 16-bit patterns: it needs dtype bf16 or fp16")
            check(p.H > p.I, f"values=sweep lays I={p.I} gates and an up value into H={p.H} columns: it needs H > I")
            check(not p.act.limit or p.act.limit >= 1, "values=sweep needs limit 0 or >= 1")

    def _check_routing(self) -> None:
        p, routing = self.problem, self.routing
        if p.routed_ids < p.K:
            repeats = ("dup", "none", "router")
            check(routing in repeats, f"K > E names experts twice: routing={routing} cannot, use {', '.join(repeats)}")
        if routing == "empty":
            check(p.E - p.K >= 3, "routing=empty leaves 3 experts without tokens: it needs E >= K + 3")
        if routing == "router":
            # ROUTE is judged on any logits; the rest of the layer needs weights that count.
            check(
                self.logits != "deep", "routing=router with logits=deep: the weights underflow; ROUTE needs no routing=router"
            )
        if routing in ("tile", "pair"):
            check(p.K <= p.E and p.E > 1, f"routing={routing} needs E > 1 and K <= E")

    def _check_relation(self) -> None:
        p = self.problem
        shared = [q for q in (p.quant.a1, p.quant.a2) if q is not None and not q.by_token and not q.static]
        if self.relation == "relabel":
            check(p.ep == 1, "relation=relabel needs every expert's weights here: ep=1")
            one = f"scheme {p.scheme} has one scale for all that a rank computes"
            check(self.ranks == 1 or not shared, f"relation=relabel: {one}, and other experts would be on it")
        if self.relation == "double":
            linear = not (p.weight_on_input or p.shared or p.latent_norm)
            check(linear, "relation=double needs a result linear in the weights: no weight_on_input, shared or latent_norm")
        if self.relation == "duplicate":
            check(not p.capacity, "relation=duplicate doubles the rows: it needs capacity=0")
        if self.relation == "split":
            check(not shared, f"relation=split: scheme {p.scheme} has one scale for all tokens, which half of them change")
        if self.relation == "ranks":
            check(self.ranks > 1, "relation=ranks moves tokens from rank to rank: it needs ranks > 1")
            check(self.world.distinct, "relation=ranks needs each token on one rank only: tp=1, or sp=1")
            check(not self.redundant, "relation=ranks: a token's replica depends on its rank, so redundant must be 0")
        check(self.relation == "none" or not self.huge, "relation and huge=1 do not go together")

    def __str__(self) -> str:
        parts = [str(self.problem)]
        optional = [f for f in fields(self) if f.name in _RECIPES or f.name in _WORLD]
        parts += [f"{f.name}={getattr(self, f.name)}" for f in optional if getattr(self, f.name) != f.default]
        parts += [f"{flag}=1" for flag in _FLAGS if getattr(self, flag)]
        return ",".join([*parts, f"seed={self.seed}"])

    @property
    def world(self) -> World:
        """The ranks and what each holds. Raises ContractError where they cannot share this problem."""
        # Grid first: its messages are about ranks and tp, which the shares below divide by.
        grid = Grid(self.problem.weight_experts, self.ranks, self.tp, self.redundant, self.problem.placement)
        per_rank = grid.tp == 1 or bool(self.sp)
        shares = spread_tokens(self.problem.T, self.ranks if per_rank else grid.ep, self.spread, self.seed)
        tokens = shares if per_rank else tuple(n for n in shares for _ in range(grid.tp))
        return World(self.problem, tokens, self.tp, bool(self.sp), self.redundant)

    def with_problem(self, **changes: object) -> Case:
        """The same case with some fields of its problem changed."""
        return replace(self, problem=replace(self.problem, **changes))  # type: ignore[arg-type]


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
        from moeproof.harness.cases.presets import preset  # presets are cases themselves

        base = preset(options.pop("model"))
        explicit = _split(str(base))
        options = explicit | options
    allowed = (*PROBLEM_KEYS, *_RECIPES, *_WORLD, *_FLAGS, "seed")
    for key in options:
        known("case key", key, (*allowed, "model"))
    problem = Problem.from_options({k: v for k, v in options.items() if k in PROBLEM_KEYS})
    recipes: dict[str, object] = {k: options[k] for k in _RECIPES if k in options}
    for key in _WORLD:
        if key in options:
            check(options[key].isdecimal(), f"{key}='{options[key]}' is not a whole number >= 0")
            recipes[key] = int(options[key])
    for flag in set(_FLAGS) & set(options):
        check(options[flag] in ("0", "1"), f"{flag}='{options[flag]}' is not 0 or 1")
        recipes[flag] = options[flag] == "1"
    if "seed" in options:
        check(options["seed"].isdecimal(), f"seed='{options['seed']}' is not a whole number >= 0")
        recipes["seed"] = int(options["seed"])
    return Case(problem, **recipes)  # type: ignore[arg-type]


def _split(line: str) -> dict[str, str]:
    return dict(part.split("=", 1) for part in line.split(","))
