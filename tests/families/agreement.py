"""Does a block's answer agree with the oracle? Only the oracle's own bounds allow a difference; nothing here is tuned.

A block computes its own logits in float32, so three doubts add to `chain`, which takes routing as given:

    logits    d_te = dot_error of the router's matmul (H terms), plus the error of its input where it is normalised first
    weights   |dw| <= 2 max_e(d_te) |w| + Selection.error. For any score: d log softmax <= 2d, d log sigmoid <= d,
              d log sqrt(softplus) <= d/2; dividing by a norm of them at most doubles the latter two, and cancels in softmax
    output    sum_k |dw_tk| |y_tk|: an error A, which `chain` counts as a standard deviation A / 7 as all others
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeproof.reference.contract import Claims, Inputs
from moeproof.reference.oracle import Selection, chain, route
from moeproof.reference.oracle.bounds import U32, dot_error
from moeproof.reference.oracle.router import prepare_logits, score, select

from .witness import Tensor, Witness

DEFAULT = Claims()


@dataclass(frozen=True)
class Routing:
    """The oracle's routing of a witness: `weight_error` (T, K) holds for rows that are `clear` (T,) of ties."""

    inputs: Inputs
    selection: Selection
    weight_error: Tensor
    clear: Tensor


@dataclass(frozen=True)
class Agreement:
    """`ratio` is the largest observed/allowed over elements of clear rows; `rows` of `tokens` rows were clear."""

    ratio: float
    rows: int
    tokens: int
    bad: int
    where: tuple[int, int] | None

    @property
    def holds(self) -> bool:
        return self.bad == 0

    def __str__(self) -> str:
        place = f", worst at token {self.where[0]} column {self.where[1]}" if self.where else ""
        return f"observed/allowed {self.ratio:.3g}, {self.bad} bad elements, {self.rows} of {self.tokens} rows clear{place}"


def logits(w: Witness) -> tuple[Tensor, Tensor]:
    """(exact, how far the block's float32 logits may be), float64 (T, E)."""
    x, weight = w.router_x.double(), w.router_w.double()
    exact, S = x @ weight.T, x.abs() @ weight.abs().T
    if w.router_b is not None:
        exact, S = exact + w.router_b.double(), S + w.router_b.double().abs()
    terms = weight.shape[1] + (w.router_b is not None)
    fmt = w.problem.fmt
    return exact, dot_error(S, exact, terms, 0.0, fmt, DEFAULT) + w.router_x_error * U32 * S


def routed(w: Witness) -> Routing:
    """What the oracle's router makes of the block's logits, and which rows are decided beyond float32's doubt."""
    exact, doubt = logits(w)
    inputs = replace(w.inputs, logits=exact)
    selection = route(inputs)
    worst = doubt.amax(dim=-1, keepdim=True) * w.problem.router.multiplier
    error = selection.error + 2 * worst * selection.weights.abs()
    weights = selection.weights.float()
    filled = replace(inputs, topk_ids=selection.ids.int(), topk_weights=weights)
    return Routing(filled, selection, error + U32 * weights.abs(), _clear(inputs, selection, worst))


def _clear(inputs: Inputs, selection: Selection, logit_doubt: Tensor) -> Tensor:
    """bool (T,): rows in which neither an expert nor a group is chosen by less than twice the doubt of its score."""
    p, router = inputs.problem, inputs.problem.router
    assert inputs.logits is not None
    if router.table or not p.T:
        return torch.ones(p.T, dtype=torch.bool)
    x = prepare_logits(inputs.logits, router)
    scores, _ = score(x, router)
    slope = torch.ones_like(scores) if router.score in ("softmax_topk", "sparsemixer") else 2 * scores
    margin = selection.margin + slope * logit_doubt
    choice = scores + inputs.correction_bias.double() if inputs.correction_bias is not None else scores
    if router.score == "sparsemixer":
        return ~_near_mask(x, router.jitter_eps, logit_doubt) & _gaps(x, margin, p.K)
    _, masked, open_groups = select(choice, margin, router, p.K)
    return ~open_groups & _gaps(masked, margin, p.K)


def _gaps(choice: Tensor, margin: Tensor, k: int) -> Tensor:
    """bool (T,): the k-th best score is above the next by more than both margins."""
    order = torch.argsort(choice, dim=-1, descending=True, stable=True)
    if k >= choice.shape[1]:
        return torch.ones(choice.shape[0], dtype=torch.bool)
    worst_in = (choice - margin).gather(1, order[:, :k]).amin(dim=-1)
    best_out = (choice + margin).gather(1, order[:, k:]).amax(dim=-1)
    return worst_in > best_out


def _near_mask(x: Tensor, eps: float, doubt: Tensor) -> Tensor:
    """bool (T,): sparsemixer's mask or the order of its two experts hangs on less than the doubt of the logits.

    gap = (best - x) / max(|x|, best); its relative doubt is at most 3 doubts over the denominator.
    """
    near = torch.zeros(x.shape[0], dtype=torch.bool)
    rest = x
    for _ in range(2):
        top = rest.topk(2, dim=-1)
        scale = torch.maximum(x.abs(), top.values[:, :1])
        gap = (top.values[:, :1] - x) / scale
        near |= ((gap - 2 * eps).abs() * scale < 3 * doubt * (1 + gap.abs())).any(dim=-1)
        near |= top.values[:, 0] - top.values[:, 1] < 2 * doubt[:, 0]
        rest = rest.scatter(1, top.indices[:, :1], -torch.inf)
    return near


def expected(r: Routing, claims: Claims = DEFAULT) -> tuple[Tensor, Tensor]:
    """(out, allowed error), float64 (T, H): the oracle's chain, and the doubt of the weights beside it."""
    trace = chain(r.inputs, claims)
    out, y = trace["out"], trace["y"].value
    p = r.inputs.problem
    assert out.bound is not None
    if p.weight_on_input:
        # The error of the only weight, through the whole expert: slope by a central difference of 2^-10.
        step = 2.0**-10
        up, down = (
            chain(replace(r.inputs, topk_weights=r.inputs.topk_weights * (1 + s * step)), claims)["out"].value for s in (1, -1)
        )
        # Two more roundings: each side rounds weight times input once.
        relative = r.weight_error / r.inputs.topk_weights.abs() + 2 * U32
        extra = (up - down).abs() / (2 * step) * relative
    else:
        live = torch.where(r.inputs.topk_ids[:, :, None] < p.E, y, _identity(r.inputs, y))
        extra = (r.weight_error[:, :, None] * live.abs()).sum(dim=1) * abs(p.scale_on_sum)
        if p.latent:
            assert r.inputs.latent_up is not None
            extra = extra @ r.inputs.latent_up.double().abs().T
    return out.value, (out.bound**2 + extra**2).sqrt()


def _identity(inputs: Inputs, like: Tensor) -> Tensor:
    return inputs.hidden_states.double()[:, None, :].expand_as(like) if inputs.problem.router.zero_experts else like


def compare(w: Witness, claims: Claims = DEFAULT, reading: Routing | None = None) -> Agreement:
    """The block's output against the oracle on `reading` (by default the right one). Rows are clear in the right one."""
    right = routed(w)
    value, allowed = expected(reading or right, claims)
    return measure(w.out, value, allowed, right.clear)


def measure(got: Tensor, value: Tensor, allowed: Tensor, rows: Tensor) -> Agreement:
    """Observed against allowed, element by element, in the given rows. NaN is bad."""
    error = (got.double() - value).abs()
    ratio = torch.where(error == 0, 0.0, error / allowed).nan_to_num(nan=torch.inf)[rows]
    kept = torch.nonzero(rows).flatten()
    if not ratio.numel():
        return Agreement(0.0, len(kept), len(rows), 0, None)
    row, column = divmod(int(ratio.argmax()), ratio.shape[1])
    return Agreement(float(ratio.max()), len(kept), len(rows), int((ratio > 1).sum()), (int(kept[row]), column))
