"""What all ranks showed in all calls of a case -> a ruling: the checks of harness.judging.checks, for several ranks.

In order: damage around the calls, values of the first one, of every other that is not its repetition bit by bit, the same
bits where they must be, the case's history and relation, the vacuity gate. Every finding names its rank.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.case import Case
from moeproof.harness.cases.worlds import whole_case
from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.expect import Expectation
from moeproof.harness.judging.gate import blind_case, blind_spots
from moeproof.harness.judging.relations import RELATIONS, scaling_error
from moeproof.harness.judging.trial import Ruling, Tally
from moeproof.harness.ranks.calls import Called
from moeproof.harness.ranks.checks import WorldExpectation, judge_world
from moeproof.harness.ranks.turns import Turn, rank_order, relation_stream, replays, turn_whole, turns
from moeproof.harness.verdict import Finding, Outcome
from moeproof.reference.contract.candidate import Claims, RankPair
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.value import Value

Tensor = torch.Tensor
Shown = Mapping[str, Tensor]
SETTLED = ("out", "expert_num_tokens")
"""Tensors whose bits may not change from call to call; the order of rows is open, and so is what padding holds."""
AGAIN = "called again"


@dataclass(frozen=True)
class Seen:
    """One call, with what every rank showed in it."""

    turn: Turn
    calls: Sequence[Called]

    @property
    def shown(self) -> list[Shown]:
        return [call.shown for call in self.calls]


class Judgement:
    """One candidate on one case on all ranks. `answers` hold each rank's calls in the order of ranks.turns.turns(case)."""

    def __init__(self, case: Case, pair: RankPair, calls: Sequence[Sequence[Called]], lean: bool = False) -> None:
        plan = turns(case, lean)
        self.case, self.pair, self.claims, self.lean = case, pair, pair.claims, lean
        self.seen = [Seen(turn, [rank[n] for rank in calls]) for n, turn in enumerate(plan)]
        self.tally = Tally()
        self.results: dict[str, Comparison] = {}
        """Of the first call."""

    def ruling(self, replayed: Sequence[Sequence[Called]] | str = "") -> Ruling:
        """The first ruling of anything that has one. `replayed` has each rank's replays, or why there are none."""
        checks = (self._damage, self._values, self._repeats, lambda: self._replays(replayed), self._relation, self._vacuity)
        return next((ruling for check in checks[: 2 if self.lean else None] if (ruling := check())), Ruling(Outcome.PASS))

    def _damage(self) -> Ruling | None:
        found = [_said(f, seen.turn) for seen in self.seen for call in seen.calls for f in call.findings]
        return Ruling(Outcome.FAIL, tuple(found)) if found else None

    def _values(self) -> Ruling | None:
        self.results, ruling = self._right(self.seen[0])
        return ruling

    def _right(self, seen: Seen) -> tuple[dict[str, Comparison], Ruling | None]:
        """One call against the oracle."""
        results = judge_world(expectation(seen.turn, self.pair), seen.shown)
        self.tally.add(sum(r.checked for r in results.values()), {name: r.ratio for name, r in results.items()})
        found = tuple(_said(f, seen.turn) for r in results.values() for f in r.findings)
        return results, Ruling(Outcome.FAIL, found) if found else None

    def _repeats(self) -> Ruling | None:
        """Every later call: right by itself, and with the bits of the first one where it repeats it."""
        first, changed = self.seen[0], {}
        for number, seen in enumerate(self.seen[1:], start=1):
            if seen.turn.changed is not None:
                continue
            repeats = seen.turn.repeats(first.turn)
            if repeats and not any(_changed(a, b, a) for a, b in zip(first.shown, seen.shown, strict=True)):
                self.tally.add(sum(call.shown["out"].numel() for call in seen.calls))
                continue
            _, ruling = self._right(seen)
            if ruling:
                return ruling
            if repeats:
                pairs = enumerate(zip(first.shown, seen.shown, strict=True))
                changed[number] = [(rank, name) for rank, (a, b) in pairs for name in _changed(a, b, SETTLED)]
        if self.claims.deterministic == "none":
            return None
        return self._unsteady({number: places for number, places in changed.items() if places})

    def _unsteady(self, changed: Mapping[int, Sequence[tuple[int, str]]]) -> Ruling | None:
        """Right values, other bits: FLAKY where a mere repetition has them, FAIL where something made the difference."""
        if not changed:
            return None
        again = next((n for n in changed if self.seen[n].turn.why == AGAIN), None)
        number = next(iter(changed)) if again is None else again
        turn = self.seen[number].turn
        words = f"has other bits than the first call {turn.why}"
        if again is not None:
            words = "two runs on the same inputs differ, and the candidate claims the same bits from run to run"
        stages = {"out": Stage.COMBINE, "expert_num_tokens": Stage.DISPATCH}
        findings = tuple(Finding(stages[name], name, words, rank=rank) for rank, name in changed[number])
        return Ruling(Outcome.FAIL if again is None else Outcome.FLAKY, findings)

    def _replays(self, replayed: Sequence[Sequence[Called]] | str) -> Ruling | None:
        if self.case.history != "graph":
            return None
        if isinstance(replayed, str):
            return Ruling(Outcome.UNSUPPORTED, reason=f"cannot be captured in a CUDA graph: {replayed}")
        for number, turn in enumerate(replays(self.case)):
            _, ruling = self._right(Seen(turn, [rank[number] for rank in replayed]))
            if ruling:
                return ruling
        return None

    def _relation(self) -> Ruling | None:
        """The case's relation between the first call and those that it makes; bitwise where batches may not matter."""
        changed = [seen for seen in self.seen if seen.turn.changed is not None]
        if not changed:
            return None
        world, name = self.case.world, self.case.relation
        first = together(world, [s["out"] for s in self.seen[0].shown]).double()
        bound = whole_out(expectation(self.seen[0].turn, self.pair)).bound
        assert bound is not None
        wants, bounds = self._related(first), self._related(2 * bound)
        exact = self._keeps_bits()
        for seen, want, allowed in zip(changed, wants, bounds, strict=True):
            got = together(seen.turn.world, [s["out"] for s in seen.shown])
            fmt = self.case.problem.fmt
            if exact:
                allowed = scaling_error(want, fmt) if name == "double" else torch.zeros_like(want)
            result = compare("out", got, Value(want, allowed, None, fmt))
            self.tally.add(result.checked)
            if result.findings:
                how = "the bits of" if exact else "twice the bound of"
                words = f"relation {name} is broken: the plain call gave another result, outside {how} it"
                at = [(f, *seen.turn.world.where(f.token or 0)) for f in result.findings]
                found = tuple(replace(f, message=words, rank=rank, token=token) for f, rank, token in at)
                return Ruling(Outcome.FAIL, found)
        return None

    def _keeps_bits(self) -> bool:
        """Whether the relation must hold bit for bit: weights times two always do, in one order of summing in float32."""
        if self.case.relation == "double":
            return self.claims.deterministic != "none" and self.claims.combine == "fp32"
        return self.claims.deterministic == "batch" and self.case.relation not in ("relabel", "flip")

    def _related(self, out: Tensor) -> tuple[Tensor, ...]:
        """(T, H) per call: what the relation makes of the plain call's rows."""
        case = self.case
        if case.relation == "ranks":
            return (torch.cat([out[case.world.rows(rank)] for rank in rank_order(case)]),)
        inputs = turn_whole(self.seen[0].turn)
        return RELATIONS[case.relation].expected(out, inputs, relation_stream(case, out.device))

    def _vacuity(self) -> Ruling | None:
        """The L0 gate, on what these ranks showed and were judged by."""
        first = self.seen[0].shown[0]
        whole = replace(whole_case(self.case), strided=False)
        if self.case.world.tp == 1:
            isolated = "y" in self.results and "y" in first
            shown = tuple((name, first[name].dtype) for name in (("y", "out") if isolated else ("out",)))
            reasons = blind_case(whole, self.claims, shown)
        else:
            reasons = blind_spots(Together(expectation(self.seen[0].turn, self.pair)), (("out", first["out"].dtype),))
        return Ruling(Outcome.VACUOUS, reason="; ".join(reasons)) if reasons else None


class Together(Expectation):
    """The whole layer as its ranks are judged: shards of I bring an error each."""

    def __init__(self, expect: WorldExpectation) -> None:
        super().__init__(expect.whole, expect.claims)
        self._out = whole_out(expect)

    def chained(self, name: str) -> Value:
        return self._out if name == "out" else super().chained(name)


def together(world: World, outs: Sequence[Tensor]) -> Tensor:
    """(T, H): each token once, from the first rank that holds it."""
    ranks = range(world.ranks) if world.distinct else range(0, world.ranks, world.tp)
    return torch.cat([outs[rank] for rank in ranks])


def whole_out(expect: WorldExpectation) -> Value:
    """What all ranks' outputs must be, as one tensor."""
    outs = [view.out for view in expect.ranks]
    assert all(v.bound is not None for v in outs)
    return Value(
        together(expect.world, [v.value for v in outs]),
        together(expect.world, [v.bound for v in outs if v.bound is not None]),
        None,
        outs[0].fmt,
    )


def expectation(turn: Turn, pair: RankPair) -> WorldExpectation:
    """The oracle's answers for a call; one serves all candidates of a case that make the same claims."""
    return _expected(replace(turn, instance=0, pattern="nan", why="", late=None), pair.claims, pair.quant1)


@functools.lru_cache(maxsize=4)
def _expected(turn: Turn, claims: Claims, quant1: str) -> WorldExpectation:
    return WorldExpectation(turn.world, turn_whole(turn), claims, quant1)


def _said(finding: Finding, turn: Turn) -> Finding:
    """The finding, saying which call it is about."""
    return replace(finding, message=f"{finding.message} ({turn.why})") if turn.why else finding


def _changed(a: Shown, b: Shown, names: Mapping[str, Tensor] | Sequence[str]) -> list[str]:
    """Those of the tensors that differ between two calls, bit for bit."""
    return [n for n in names if (n in a) != (n in b) or (n in a and not _same_bits(a[n], b[n]))]


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    bits = [t.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8) for t in (a, b)]
    return bool(torch.equal(*bits))
