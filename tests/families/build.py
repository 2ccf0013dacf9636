"""The table of transformers' MoE blocks: how each is built, and where its weights belong in moeproof's Inputs.

Names and layouts were read in transformers 5.23.0. Parameters are torch.empty there: all are filled here, by name, from
the counter-based generator, so that a family has the same bytes everywhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moeproof.harness.cases.generator import Stream
from moeproof.reference.contract import Activation, Problem, Router

from .witness import Tensor, Witness, unrouted


@dataclass(frozen=True)
class Dims:
    """Sizes of a test block; the shared expert is 2 * I wide where it may be."""

    T: int = 48
    H: int = 64
    I: int = 48  # noqa: E741  (the field's letter)
    E: int = 16
    K: int = 4

    @property
    def shared(self) -> int:
        return 2 * self.I

    @property
    def groups(self) -> int:
        """Expert groups of 4, of which half are kept, where the family has groups."""
        return self.E // 4


TINY = Dims(T=12, H=24, I=16, E=8, K=2)
"""Golden files: about 40 KB of weights."""


@dataclass(frozen=True)
class Family:
    """One block of transformers. `module.block(config(**options))`, in the vocabulary: router, act and flags of Problem."""

    name: str
    module: str
    config: str
    block: str
    router: str
    options: Callable[[Dims], dict[str, Any]]
    act: str = "silu"
    shared: Callable[[Dims], int] = lambda d: 0
    shared_path: str = "shared_experts"
    shared_gate: bool = False
    router_path: str = "gate"
    bias_path: str = ""
    gain: float = 2.0
    """Standard deviation of the logits."""
    flags: Callable[[Dims], dict[str, Any]] = lambda d: {}
    make: Callable[[Any, Any], nn.Module] | None = None
    """Builds the block from (module, config), where it is not `block(config)`."""
    args: tuple[Any, ...] = ()
    k: int = 0
    """Slots per token where the family has its own number."""

    def dims(self, d: Dims) -> Dims:
        return Dims(d.T, d.H, d.I, d.E, min(self.k, d.E) if self.k else d.K)

    def problem(self, d: Dims) -> Problem:
        d = self.dims(d)
        router = Router.parse(self.router.format(groups=d.groups, keep=d.groups // 2, zero=d.E // 4))
        return Problem(
            T=d.T,
            H=d.H,
            I=d.I,
            E=d.E,
            K=d.K,
            dtype="fp32",
            act=Activation.parse(self.act),
            router=router,
            shared=self.shared(d),
            shared_gate=self.shared_gate,
            **self.flags(d),
        )


# ----------------------------------------------------------------------------------------------------------- the blocks


def block_of(family: Family, dims: Dims, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The family's block with filled parameters, in eager mode, eval, without gradients."""
    d = family.dims(dims)
    module = importlib.import_module(f"transformers.models.{family.module}.modeling_{family.module}")
    configuration = importlib.import_module(f"transformers.models.{family.module}.configuration_{family.module}")
    config = getattr(configuration, family.config)(**family.options(d))
    for part in (config, getattr(config, "ffn_config", None)):
        if part is not None:
            part._experts_implementation = "eager"
    block: nn.Module = family.make(module, config) if family.make else getattr(module, family.block)(config, *family.args)
    fill(family, block, d)
    return block.to(dtype).eval().requires_grad_(False)


def fill(family: Family, block: nn.Module, d: Dims) -> None:
    """Scales that make routing, biases, clamps and the shared part all matter (docs/models.md)."""
    stream = Stream(7, family.name)
    for name, p in sorted([*block.named_parameters(), *block.named_buffers()]):
        with torch.no_grad():
            if name.endswith("tid2eid"):
                # Distinct experts in a row, as released tables mostly have; the last row repeats one.
                table = stream.shuffled(p.shape[0], d.E)[:, : d.K]
                table[-1] = table[-1, :1]
                p.copy_(table)
            else:
                centre, spread = _scale(family, name, d)
                p.copy_((centre + spread * stream.normal(*p.shape)).float())


def _scale(family: Family, name: str, d: Dims) -> tuple[float, float]:
    """(mean, standard deviation) of a parameter, by its name."""
    own = name.startswith(family.router_path) or "router" in name
    if "correction_bias" in name:
        return 0.0, 0.2
    if name.endswith("scale") or "norm" in name:
        return 1.0, 0.3
    if name.endswith("bias"):
        return 0.0, 0.5
    if "shared_expert_gate" in name:
        return 0.0, 1.0 / d.H**0.5
    if own:
        # gemma4 scales the router's normalised input by H^-0.5.
        return 0.0, family.gain * (1.0 if family.name == "gemma4" else d.H**-0.5)
    inner = "down" in name or name.endswith("w2")
    return 0.0, (d.I if inner else d.H) ** -0.5


# --------------------------------------------------------------------------------------------------------- the mappings


def weights_of(family: Family, block: nn.Module, p: Problem) -> dict[str, Tensor | None]:
    """w1 (E, N, H), w2 (E, H, I) and the experts' biases, in moeproof's coordinates, sharing memory with the block."""
    experts: Any = block.experts
    if family.name == "dbrx":
        w1, v1, w2 = (getattr(experts.mlp, n).view(p.E, p.I, p.H) for n in ("w1", "v1", "w2"))
        return {"w1": torch.cat([w1, v1], dim=1), "w2": w2.transpose(1, 2)}
    w1 = (experts.gate_up_proj if p.act.gated else experts.up_proj)[: p.E]
    w2 = experts.down_proj
    if p.storage == "KN":
        w1, w2 = w1.transpose(1, 2), w2.transpose(1, 2)
    found: dict[str, Tensor | None] = {"w1": w1, "w2": w2}
    if p.expert_bias:
        found |= {"b1": experts.gate_up_proj_bias, "b2": experts.down_proj_bias}
    return found


def shared_of(family: Family, block: nn.Module, p: Problem) -> dict[str, Tensor | None]:
    found: dict[str, Tensor | None] = {}
    if p.shared:
        mlp: Any = block.get_submodule(family.shared_path)
        rows = [mlp.gate_proj.weight, mlp.up_proj.weight] if p.act.gated else [mlp.up_proj.weight]
        found |= {"shared_w1": torch.cat(rows), "shared_w2": mlp.down_proj.weight}
    if p.shared_gate:
        found["shared_gate"] = block.shared_expert_gate.weight[0]  # type: ignore[union-attr, index]
    if p.latent:
        found |= {"latent_down": block.fc1_latent_proj.weight, "latent_up": block.fc2_latent_proj.weight}  # type: ignore[union-attr, dict-item]
    return found


def router_of(family: Family, block: nn.Module, x: Tensor) -> dict[str, Any]:
    """router_x, router_w and what else the witness says about the router."""
    router: Any = block.get_submodule(family.router_path)
    linear = next((getattr(router, n) for n in ("layer", "classifier", "wg", "proj") if hasattr(router, n)), router)
    found = {"router_x": x.double(), "router_w": linear.weight, "router_b": getattr(linear, "bias", None)}
    if family.name == "gemma4":
        norm = torch.rsqrt((x.double() ** 2).mean(dim=-1, keepdim=True) + router.eps)
        found["router_x"] = x.double() * norm * router.scale.double() * router.scalar_root_size
        # Mean of H squares: (H^0.5 + 8) / 2 after the root; pow, three products and the stored constants: 8.
        found["router_x_error"] = (x.shape[1] ** 0.5 + 8) / 2 + 8
    return found


def hidden(family: Family, d: Dims, tail: bool = False) -> Tensor:
    """float32 (T, H), normal. With `tail`, column 0 is 4: `lean_gate` turns it into gates near -3."""
    x = Stream(11, f"{family.name}/x").normal(d.T, d.H).float()
    if tail:
        x[:, 0] = 4.0
    return x


def lean_gate(family: Family, block: nn.Module, p: Problem) -> None:
    """Shift every gate pre-activation by -3 for inputs whose column 0 is 4: the tail where erf and tanh gelu differ."""
    w1 = weights_of(family, block, p)["w1"]
    assert w1 is not None
    gate = w1[:, 0::2] if p.act.interleaved else w1[:, : p.I]
    with torch.no_grad():
        gate[:, :, 0] = -0.75


VARIANTS = ("plain", "one", "none", "negative", "tail")


def witness_of(family: Family, dims: Dims, variant: str = "plain") -> Witness:
    """Build the block, run it on the variant's input, and read its weights as moeproof's Inputs.

    plain; one: a single token; none: zero tokens; negative: correction biases lowered by 2; tail: gates near -3.
    """
    count = {"one": 1, "none": 0}.get(variant, dims.T)
    d = family.dims(Dims(count, dims.H, dims.I, dims.E, dims.K))
    block: Any = block_of(family, d)
    p = family.problem(d)
    bias: Any = functools.reduce(getattr, family.bias_path.split("."), block) if family.bias_path else None
    with torch.no_grad():
        if variant == "negative":
            assert bias is not None
            bias -= 2.0
        if variant == "tail":
            lean_gate(family, block, p)
        x = hidden(family, d, tail=variant == "tail")
        extra: dict[str, Tensor | None] = {}
        arguments: tuple[Tensor, ...] = (x[None],)
        if p.router.table:
            token_ids = torch.arange(d.T) % block.gate.tid2eid.shape[0]
            extra["table_ids"] = block.gate.tid2eid[token_ids].int()
            arguments += (token_ids[None],)
        answer = block(*arguments)
        out = (answer[0] if isinstance(answer, tuple) else answer).reshape(d.T, d.H).clone()
    if bias is not None:
        extra["correction_bias"] = bias.reshape(-1)
    if p.router.expert_scale:
        extra["expert_scale"] = block.get_submodule(family.router_path).per_expert_scale
    tensors = {"hidden_states": x} | weights_of(family, block, p) | shared_of(family, block, p) | extra
    meta = {"family": family.name, "variant": variant, "transformers": importlib.import_module("transformers").__version__}
    return Witness(unrouted(p, **tensors), out=out, **router_of(family, block, x), meta=meta | {"torch": torch.__version__})
