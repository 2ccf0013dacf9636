"""Deliberately wrong readings of a model, and harmless ones. The comparison must reject the first and accept the second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from moeproof.reference.contract import Activation, Problem
from moeproof.reference.oracle.router import renormalise

from .agreement import Routing, routed
from .witness import Tensor, Witness


@dataclass(frozen=True)
class Misreading:
    """`read` is the oracle's routing and inputs under the reading; `applies` says which problems can be read so."""

    name: str
    applies: Callable[[Problem], bool]
    read: Callable[[Witness], Routing]
    variant: str = "plain"
    """The input on which it shows."""


def _wrong(name: str, applies: Callable[[Problem], bool], change: Callable[[Witness], Witness]) -> Misreading:
    return Misreading(name, applies, lambda w: routed(change(w)))


def _rolled(w: Witness, *names: str) -> Witness:
    return w.with_inputs(**{n: getattr(w.inputs, n).roll(1, 0) for n in names if getattr(w.inputs, n) is not None})


def _swapped(w: Witness) -> Witness:
    order = torch.arange(w.problem.N)
    order = order ^ 1 if w.problem.act.interleaved else order.roll(w.problem.I)
    b1 = w.inputs.b1
    return w.with_inputs(w1=w.inputs.w1[:, order], b1=b1 if b1 is None else b1[:, order])


def _weights(change: Callable[[Witness, Routing], Tensor]) -> Callable[[Witness], Routing]:
    """The right ids with other weights."""

    def read(w: Witness) -> Routing:
        r = routed(w)
        return replace(r, inputs=replace(r.inputs, topk_weights=change(w, r).float()))

    return read


def _leaked(w: Witness, r: Routing) -> Tensor:
    biased = r.selection.choice.gather(1, r.selection.ids)
    return renormalise(biased, torch.zeros_like(biased), w.problem.router)[0] * w.problem.router.scale


def _ids(change: Callable[[Witness, Tensor], Tensor]) -> Callable[[Witness], Routing]:
    """Other ids with the right weights."""

    def read(w: Witness) -> Routing:
        r = routed(w)
        return replace(r, inputs=replace(r.inputs, topk_ids=change(w, r.inputs.topk_ids)))

    return read


def _without_last(_: Witness, ids: Tensor) -> Tensor:
    return torch.cat([ids[:, :-1], torch.full_like(ids[:, -1:], -1)], dim=1)


def _without_identity(w: Witness, ids: Tensor) -> Tensor:
    return torch.where(ids >= w.problem.E, -1, ids)


def _bias_on_logits(w: Witness) -> Witness:
    assert w.inputs.correction_bias is not None
    return replace(w.with_router(bias=False), router_b=w.inputs.correction_bias)


def _scaled_shared(w: Witness) -> Witness:
    assert w.inputs.shared_w2 is not None
    return w.with_inputs(shared_w2=w.inputs.shared_w2 * w.problem.router.scale)


def _act(name: str, **options: Any) -> Callable[[Witness], Witness]:
    return lambda w: w.with_problem(act=Activation(name, **options))


def _is(name: str) -> Callable[[Problem], bool]:
    return lambda p: p.act.name == name


def _score(*names: str) -> Callable[[Problem], bool]:
    return lambda p: p.router.score in names


_SOFTMAX: dict[str, Any] = {"score": "softmax", "jitter_eps": 0.01}

MISREADINGS = (
    # layout
    _wrong("gate and up swapped", lambda p: p.act.gated, _swapped),
    _wrong("other packing", lambda p: p.act.gated, lambda w: w.with_act(interleaved=not w.problem.act.interleaved)),
    _wrong("next expert", lambda p: True, lambda w: _rolled(w, "w1", "w2", "b1", "b2")),
    _wrong("down projection of the next expert", lambda p: True, lambda w: _rolled(w, "w2")),
    _wrong("b1 dropped", lambda p: p.expert_bias, lambda w: w.with_inputs(b1=torch.zeros_like(w.inputs.w1[:, :, 0]))),
    _wrong("b2 dropped", lambda p: p.expert_bias, lambda w: w.with_inputs(b2=torch.zeros_like(w.inputs.w2[:, :, 0]))),
    # activation
    _wrong("gelu for silu", lambda p: p.act.name == "silu" and not p.act.limit, _act("gelu")),
    _wrong("relu for relu2", _is("relu2_no_mul"), _act("relu_no_mul")),
    _wrong("silu for relu2", _is("relu2_no_mul"), _act("silu_no_mul")),
    _wrong("clamp dropped", lambda p: bool(p.act.limit), lambda w: w.with_act(limit=1e4)),
    _wrong(
        "clamp after silu",
        lambda p: p.act.name == "silu" and bool(p.act.limit),
        lambda w: w.with_problem(act=Activation("swiglustep", limit=w.problem.act.limit)),
    ),
    _wrong("alpha 1", _is("swigluoai"), lambda w: w.with_act(alpha=1.0)),
    _wrong("up without one", _is("swigluoai"), lambda w: w.with_act(beta=0.0)),
    _wrong("gelu erf for tanh", _is("gelu_tanh"), _act("gelu")),
    replace(_wrong("gelu erf for tanh in the tail", _is("gelu_tanh"), _act("gelu")), variant="tail"),
    # scores and selection
    _wrong("softmax for sigmoid", _score("sigmoid", "sqrtsoftplus"), lambda w: w.with_router(score="softmax")),
    _wrong("sigmoid for softmax", _score("softmax"), lambda w: w.with_router(score="sigmoid")),
    _wrong("softmax over all", _score("softmax_topk"), lambda w: w.with_router(score="softmax")),
    _wrong("top-2 of softmax", _score("sparsemixer"), lambda w: w.with_router(**_SOFTMAX)),
    _wrong("renormalised top-2", _score("sparsemixer"), lambda w: w.with_router(**_SOFTMAX, renorm="sum")),
    _wrong("narrow jitter", _score("sparsemixer"), lambda w: w.with_router(jitter_eps=0.01)),
    _wrong("bias dropped", lambda p: p.router.bias, lambda w: w.with_router(bias=False)),
    _wrong("bias on the logits", lambda p: p.router.bias, _bias_on_logits),
    Misreading("bias leaks into the weights", lambda p: p.router.bias, _weights(_leaked)),
    _wrong("router's bias dropped", lambda p: p.expert_bias, lambda w: replace(w, router_b=None)),
    _wrong("groups ignored", lambda p: p.router.groups > 0, lambda w: w.with_router(groups=0, keep=0, group_score="max")),
    _wrong(
        "other group score",
        lambda p: p.router.groups > 0,
        lambda w: w.with_router(group_score="max" if w.problem.router.group_score == "top2" else "top2"),
    ),
    replace(
        _wrong(
            "rejected groups get 0", lambda p: p.router.bias and p.router.groups > 0, lambda w: w.with_router(rejected="zero")
        ),
        variant="negative",
    ),
    _wrong("table ignored", lambda p: p.router.table, lambda w: w.with_router(table=False)),
    _wrong(
        "router sees the raw input",
        lambda p: p.router.expert_scale,
        lambda w: replace(w, router_x=w.inputs.hidden_states.double(), router_x_error=0.0),
    ),
    # weights
    _wrong(
        "renormalisation dropped",
        lambda p: p.router.renorm != "none",
        lambda w: w.with_router(renorm="none", renorm_value=0.0),
    ),
    _wrong(
        "renormalised",
        lambda p: p.router.renorm == "none" and p.router.score in ("softmax", "sigmoid") and p.K > 1,
        lambda w: w.with_router(renorm="sum"),
    ),
    _wrong("L2 norm for L1", lambda p: p.router.renorm == "lp", lambda w: w.with_router(renorm_value=2.0)),
    _wrong("scale dropped", lambda p: p.router.scale != 1, lambda w: w.with_router(scale=1.0)),
    _wrong("scale on the shared expert", lambda p: p.router.scale != 1 and p.shared > 0, _scaled_shared),
    _wrong("expert scale dropped", lambda p: p.router.expert_scale, lambda w: w.with_router(expert_scale=False)),
    _wrong(
        "weight on the output",
        lambda p: p.weight_on_input,
        lambda w: w.with_problem(weight_on_input=False),
    ),
    Misreading("weight twice", lambda p: True, _weights(lambda w, r: r.inputs.topk_weights**2)),
    # slots and the parts around the experts
    Misreading("last slot dropped", lambda p: p.K > 1, _ids(_without_last)),
    Misreading("identity experts dropped", lambda p: p.router.zero_experts > 0, _ids(_without_identity)),
    _wrong("shared expert dropped", lambda p: p.shared > 0, lambda w: w.with_problem(shared=0, shared_gate=False)),
    _wrong(
        "shared gate dropped",
        lambda p: p.shared_gate,
        lambda w: w.with_problem(shared_gate=False).with_inputs(shared_gate=None),
    ),
)

EQUIVALENT = (
    _wrong(
        "softmax over all, renormalised",
        _score("softmax_topk"),
        lambda w: w.with_router(score="softmax", renorm="sum"),
    ),
    _wrong(
        "softmax over the selected",
        lambda p: p.router.score == "softmax" and p.router.renorm == "sum" and not p.router.bias,
        lambda w: w.with_router(score="softmax_topk", renorm="none"),
    ),
    _wrong("no guard of the sum", lambda p: p.router.renorm == "eps", lambda w: w.with_router(renorm="sum", renorm_value=0.0)),
    _wrong(
        "no floor of the sum", lambda p: p.router.renorm == "floor", lambda w: w.with_router(renorm="sum", renorm_value=0.0)
    ),
    _wrong("L1 norm is the sum", lambda p: p.router.renorm == "lp", lambda w: w.with_router(renorm="sum", renorm_value=0.0)),
    _wrong(
        "rejected groups get 0, positive scores",
        lambda p: p.router.groups > 0 and not p.router.bias,
        lambda w: w.with_router(rejected="neginf"),
    ),
)


def for_problem(problem: Problem, table: tuple[Misreading, ...] = MISREADINGS) -> list[Misreading]:
    """The readings of `table` that this problem can be given."""
    return [m for m in table if m.applies(problem)]
