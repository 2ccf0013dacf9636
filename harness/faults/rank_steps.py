"""The wrong steps of harness.faults.on_ranks: each is called in the place of a right one, which it gets first.

`prepare` has the arguments (a1, a1_scale, a2_scale, weights, ids, num_experts, expert_map, weight_on_input) and returns
(rows, scales, counts, ids, weights); `finalize` has (output, y, weights, ids, weight_on_input); `apply` and `forward` as in
contract.modular.
"""

from __future__ import annotations

import functools
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.world import World
from moeproof.reference.eager.activations import activate
from moeproof.reference.eager.experts import matmul
from moeproof.reference.eager.slots import sum_slots

Tensor = torch.Tensor
Right = Callable[..., Any]
Prepared = tuple[Any, ...]
FOR_EVER = 3600.0


@dataclass
class Here:
    """Where a step runs, and what it keeps from call to call."""

    rank: int
    world: World | None
    link: Link | None
    armed: bool
    problem: Problem
    kept: dict[str, Any] = field(default_factory=dict)

    def instead(self, right: Right, wrong: Callable[..., Any]) -> Right:
        """`wrong` where it is armed, else the right step behind the same call."""
        return functools.partial(wrong, right, self) if self.armed else lambda *a, **k: right(*a, **k)

    @property
    def last(self) -> bool:
        assert self.world is not None
        return self.rank == self.world.ranks - 1


class Shared:
    """A replicated shared expert: what it adds to a rank's own tokens."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    def __call__(self, x: Tensor) -> Tensor:
        """float32 (T, H)."""
        i = self.inputs
        assert i.shared_w1 is not None and i.shared_w2 is not None
        y = matmul(activate(matmul(x, i.shared_w1).to(x.dtype), i.problem.act).to(x.dtype), i.shared_w2).to(x.dtype).float()
        return y if i.shared_gate is None else y * torch.sigmoid(x.float() @ i.shared_gate.float())[:, None]


# DISPATCH


def wraps(right: Right, here: Here, a1: Tensor, s1: Any, s2: Any, w: Tensor, ids: Tensor, E: int, *rest: Any) -> Prepared:
    return right(a1, s1, s2, w, ids % E, E, *rest)


def first_slot(right: Right, here: Here, a1: Tensor, s1: Any, s2: Any, w: Tensor, ids: Tensor, *rest: Any) -> Prepared:
    first = torch.arange(ids.size(1), device=ids.device) == 0
    return right(a1, s1, s2, w, torch.where(first, ids, -1), *rest)


def unfiltered(right: Right, here: Here, a1: Tensor, s1: Any, s2: Any, w: Tensor, ids: Tensor, E: int, *rest: Any) -> Prepared:
    return right(a1, s1, s2, w, torch.where(ids >= E, ids % E, ids), E, *rest)


def truncates(right: Right, here: Here, a1: Tensor, s1: Any, s2: Any, w: Tensor, ids: Tensor, *rest: Any) -> Prepared:
    """Each source sends an expert two rows at most."""
    flat = ids.flatten().tolist()
    place = torch.tensor([flat[:n].count(e) for n, e in enumerate(flat)], device=ids.device).view(ids.shape)
    return right(a1, s1, s2, w, torch.where(place < 2, ids, -1), *rest)


def spills(right: Right, here: Here, *arguments: Any) -> Prepared:
    """The last row of the first expert stands in the second one's region."""
    rows, scales, counts, ids, weights = right(*arguments)
    rows, counts = rows.clone(), counts.clone()
    if counts.numel() > 1 and int(counts[0]):
        n, m = int(counts[0]), int(counts[1])
        rows[1, m] = rows[0, n - 1]
        counts[0], counts[1] = n - 1, m + 1
    return rows, scales, counts, ids, weights


def scales_stay(right: Right, here: Here, *arguments: Any) -> Prepared:
    """Rows have moved, their scales still stand in the order of the row before."""
    rows, scales, *rest = right(*arguments)
    return rows, scales.roll(1, 0), *rest


def scales_row_major(right: Right, here: Here, *arguments: Any) -> Prepared:
    """The scales of what arrived are laid out the other way round, in the same shape."""
    rows, scales, *rest = right(*arguments)
    return rows, scales.T.contiguous().view(scales.shape), *rest


def _silently(right: Right, ids: Tensor, weights: Tensor) -> None:
    """The pair's combine gets back the ids that it returned: it would refuse others, and here nothing else is to tell."""
    pf = right.__self__  # type: ignore[attr-defined]
    finalize = type(pf).finalize

    def combine(output: Tensor, y: Tensor, w: Tensor, _: Tensor, flag: bool) -> None:
        finalize(pf, output, y[: ids.size(0)], weights, ids, flag)

    pf.finalize = combine


def tail_ids(right: Right, here: Here, *arguments: Any) -> Prepared:
    rows, scales, counts, ids, weights = right(*arguments)
    if not here.last or not rows.size(0):
        return rows, scales, counts, ids, weights
    _silently(right, ids, weights)
    return torch.cat([rows, rows[:1]]), scales, counts, torch.cat([ids, ids[:1]]), torch.cat([weights, weights[:1]])


def _live(ids: Tensor) -> tuple[int, int] | None:
    places = (ids >= 0).nonzero().tolist()
    return (places[0][0], places[0][1]) if places else None


def stale_weight(right: Right, here: Here, *arguments: Any) -> Prepared:
    rows, scales, counts, ids, weights = right(*arguments)
    at = _live(ids)
    if here.rank == 1 and at is not None:
        weights = weights.clone()
        weights[at] = 0
    return rows, scales, counts, ids, weights


def late_row(right: Right, here: Here, *arguments: Any) -> Prepared:
    """What stands in the row is another one's: that of the call before would be."""
    rows, scales, counts, ids, weights = right(*arguments)
    dice = here.kept.setdefault("dice", random.Random(here.rank))
    at = _live(ids)
    if here.rank == 1 and at is not None and dice.random() < 0.3:
        rows = rows.clone()
        rows[at[0]] = here.kept.get("row", torch.zeros_like(rows[0]))
    return rows, scales, counts, ids, weights


def padding(right: Right, here: Here, a1: Tensor, *rest: Any) -> Prepared:
    """Rows behind each rank's tokens name experts and have weights, whatever lay there."""
    rows, scales, counts, ids, weights = right(a1, *rest)
    assert here.world is not None
    most, E = here.world.max_tokens, here.world.grid.experts
    _silently(right, ids, weights)
    fill = [r * most + n for r, tokens in enumerate(here.world.tokens) for n in range(tokens, most)]
    ids = ids.clone()
    ids[fill] = torch.empty_like(ids[fill]) % E
    return rows, scales, counts, ids, weights


def overwrites(right: Right, here: Here, a1: Tensor, *rest: Any) -> Prepared:
    result = right(a1, *rest)
    if here.rank == 1:
        a1.zero_()
    return result


def ignores_strides(right: Right, here: Here, a1: Tensor, *rest: Any) -> Prepared:
    """Rank 1 reads its rows as if they stood one behind the other."""
    return right(a1.as_strided(a1.shape, (a1.size(1), 1)) if here.rank == 1 else a1, *rest)


def baked(right: Right, here: Here, a1: Tensor, s1: Any, s2: Any, w: Tensor, ids: Tensor, *rest: Any) -> Prepared:
    return right(a1, s1, s2, w, here.kept.setdefault("ids", ids.clone()), *rest)


def local_choice(right: Right, here: Here, a1: Tensor, *rest: Any) -> Prepared:
    assert here.link is not None
    x = torch.ones(here.link.size, 4, device=a1.device)
    if a1.size(0) > 4:
        here.link.reduce_scatter(x)
    else:
        here.link.all_gather(x)
    return right(a1, *rest)


def local_chunks(right: Right, here: Here, a1: Tensor, *rest: Any) -> Prepared:
    assert here.link is not None
    for _ in range(-(-a1.size(0) // 4)):
        here.link.all_gather(torch.ones(4, device=a1.device))
    return right(a1, *rest)


class OneSlot:
    """A link with one staging slot for what arrives: a later exchange overwrites what is not yet read."""

    def __init__(self, link: Link, here: Here) -> None:
        self._link, self._here, self._slot = link, here, torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Callable[[], Tensor]:
        wait = self._link.all_to_all(rows, send, receive)
        if not self._here.armed:
            return wait
        arrived = wait()
        fits = self._slot.shape[1:] == arrived.shape[1:] and self._slot.size(0) >= arrived.size(0)
        old = self._slot[arrived.size(0) :] if fits else arrived[:0]
        self._slot = torch.cat([arrived, old])
        return lambda: self._slot[: sum(receive)]


class ShortSend:
    """A link whose rank 1 sends one row fewer than it told the others."""

    def __init__(self, link: Link, here: Here) -> None:
        self._link, self._here = link, here

    def __getattr__(self, name: str) -> Any:
        return getattr(self._link, name)

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Any:
        full = [r for r, n in enumerate(send) if n and r != self._here.rank]
        if self._here.armed and self._here.rank == 1 and full:
            first = sum(send[: full[0]])
            rows = torch.cat([rows[:first], rows[first + 1 :]])
            send = [n - (r == full[0]) for r, n in enumerate(send)]
        return self._link.all_to_all(rows, send, receive)


# experts

MAP = 6
"""Place of expert_map among the arguments of `apply`."""


def global_ids(right: Right, here: Here, *arguments: Any) -> Tensor:
    """Local index = global id modulo the number of experts here: right on rank 0."""
    mapping, e = arguments[MAP], arguments[1].size(0)
    wrong = torch.where(mapping >= 0, torch.arange(mapping.numel(), device=mapping.device) % e, -1).to(mapping.dtype)
    return right(*arguments[:MAP], wrong, *arguments[MAP + 1 :])


def map_as_mask(right: Right, here: Here, *arguments: Any) -> Tensor:
    """Every local expert is taken for number 1."""
    mapping = arguments[MAP]
    wrong = torch.where(mapping >= 0, 1, -1).to(mapping.dtype)
    return right(*arguments[:MAP], wrong, *arguments[MAP + 1 :])


def bias_again(right: Right, here: Here, *arguments: Any) -> Tensor:
    """Counted once more for the other shard; on that one it is zero here, so that the sum is what a real fault gives."""
    experts = right.__self__  # type: ignore[attr-defined]
    own = experts.b2
    experts.b2 = own * 2
    try:
        return right(*arguments)
    finally:
        experts.b2 = own


_prepared: dict[tuple[Any, ...], Tensor] = {}


def caches_weights(right: Right, here: Here, x: Tensor, w1: Tensor, *rest: Any) -> Tensor:
    """The next layer with these shapes gets this one's weights."""
    return right(x, _prepared.setdefault((here.rank, tuple(w1.shape)), w1.clone()), *rest)


def stalls(right: Right, here: Here, *arguments: Any) -> Tensor:
    if here.rank == 1:
        time.sleep(FOR_EVER)
    return right(*arguments)


def dies(right: Right, here: Here, *arguments: Any) -> Tensor:
    if here.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return right(*arguments)


def raises(right: Right, here: Here, *arguments: Any) -> Tensor:
    if here.rank == 1:
        raise OverflowError("no room for a third replica")
    return right(*arguments)


# COMBINE


def weights_again(right: Right, here: Here, output: Tensor, y: Tensor, w: Tensor, ids: Tensor, flag: bool) -> None:
    right(output, y, w, ids, False)


def reduces_again(right: Right, here: Here, output: Tensor, *rest: Any) -> None:
    right(output, *rest)
    assert here.link is not None and here.world is not None
    every = output.new_zeros(here.world.max_tokens, output.size(1))
    every[: output.size(0)] = output
    output.copy_(here.link.all_gather(every).float().sum(dim=0)[: output.size(0)])


def scales_again(right: Right, here: Here, output: Tensor, *rest: Any) -> None:
    right(output, *rest)
    output.mul_(here.problem.router.scale)


def accumulates(right: Right, here: Here, output: Tensor, *rest: Any) -> None:
    right(output, *rest)
    before = here.kept.get("output")
    here.kept["output"] = output.clone()
    if before is not None and before.shape == output.shape:
        output.add_(before)


def idle_skips(right: Right, here: Here, output: Tensor, *rest: Any) -> None:
    """In every second call."""
    here.kept["call"] = here.kept.get("call", 0) + 1
    if output.size(0) or here.kept["call"] % 2:
        right(output, *rest)


def _summed(right: Right, output: Tensor, total: Tensor, y: Tensor, w: Tensor, ids: Tensor) -> None:
    """The right combine of sums that are already made: each stands in its token's first live slot, with weight 1."""
    first = (ids >= 0).long().argmax(dim=1)
    alone = torch.zeros_like(y)
    alone[torch.arange(ids.size(0), device=ids.device), first] = total.to(y.dtype)
    right(output, alone, torch.ones_like(w), ids, False)


def bf16_sum(right: Right, here: Here, output: Tensor, y: Tensor, w: Tensor, ids: Tensor, flag: bool) -> None:
    if not y.numel():
        return right(output, y, w, ids, flag)
    total = torch.zeros(y.size(0), y.size(2), dtype=torch.bfloat16, device=y.device)
    for slot in range(ids.size(1)):
        term = y[:, slot].float() * w[:, slot, None]
        total += torch.where(ids[:, slot, None] >= 0, term, 0.0).bfloat16()
    return _summed(right, output, total, y, w, ids)


def any_order(right: Right, here: Here, output: Tensor, y: Tensor, w: Tensor, ids: Tensor, flag: bool) -> None:
    """From the first slot to the last, and in the next call from the last to the first."""
    here.kept["turn"] = 1 - here.kept.get("turn", 0)
    if not y.numel() or not here.kept["turn"]:
        return right(output, y, w, ids, flag)
    total = sum_slots(y.flip(1), ids.flip(1) >= 0, w.flip(1), flag)
    return _summed(right, output, total, y, w, ids)


# the whole call


def empty_shape(right: Right, here: Here, kernel: Any, *arguments: Any, **options: Any) -> Tensor:
    out: Tensor = right(kernel, *arguments, **options)
    return out if out.size(0) else out[:, :0]


def shared_times_ranks(right: Right, here: Here, kernel: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    assert here.world is not None
    out: Tensor = right(kernel, x, *arguments, **options)
    return (out.float() + (here.world.ranks - 1) * kernel.fused_experts.shared(x)).to(out.dtype)
