"""All ranks' shown tensors against the world's expectation: pure functions, whatever carried the bytes.

What a rank shows is ranks.pairs.SHOWN. Every rank is judged and every finding names its rank. Experts are judged on the rows
that the candidate itself dispatched, COMBINE on the y that it itself computed, so the first red stage is the guilty one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from moeproof.harness.judging.compare import Comparison, compare
from moeproof.harness.judging.misround import counted
from moeproof.harness.ranks.experts import gathered, judge_experts
from moeproof.harness.ranks.received import Shown
from moeproof.harness.ranks.rows import Matched, Sources, match_rows
from moeproof.harness.verdict import Finding
from moeproof.reference.contract.candidate import Claims
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.schemes import format_of
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import World
from moeproof.reference.oracle.value import Value
from moeproof.reference.ranks.combine import combine_shards, home_inputs
from moeproof.reference.ranks.expect import RankExpectation, rank_expectations

Tensor = torch.Tensor


class WorldExpectation:
    """The oracle's answers for one call of a world; they serve every candidate and transport."""

    def __init__(self, world: World, whole: Inputs, claims: Claims, quant1: str = "source") -> None:
        """`quant1` is the candidate's own (RankPair.quant1)."""
        self.world, self.whole, self.claims = world, whole, claims
        self.ranks: list[RankExpectation] = rank_expectations(world, whole, claims, quant1)
        self.sources = Sources(world, self.ranks)

    @property
    def inputs(self) -> list[Inputs]:
        return [rank.inputs for rank in self.ranks]


def judge_world(expect: WorldExpectation, shown: Sequence[Shown]) -> dict[str, Comparison]:
    """Every tensor of every rank, by name in the order of the stages; findings of all ranks together.

    Stops after a stage with findings: what comes after it is computed from wrong rows.
    """
    results: dict[str, Comparison] = {}
    steps = (_contract, _counts, _rows, _experts, _out)
    matched: list[Matched] = []
    for step in steps:
        results |= step(expect, shown, matched)
        if any(r.findings for r in results.values()):
            break
    return results


def _merged(parts: Sequence[Comparison]) -> Comparison:
    findings = tuple(f for part in parts for f in part.findings)
    return Comparison(findings, sum(p.checked for p in parts), max((p.ratio for p in parts), default=0.0))


def _contract(expect: WorldExpectation, shown: Sequence[Shown], _: list[Matched]) -> dict[str, Comparison]:
    """Shapes and dtypes that do not depend on what the candidate chose; every rank must show `out`."""
    parts = []
    for rank, (view, tensors) in enumerate(zip(expect.ranks, shown, strict=True)):
        p, e = view.inputs.problem, len(expect.world.grid.local(rank))
        want: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"out": ((p.T, p.H), p.fmt.dtype)}
        if "expert_num_tokens" in tensors:
            want["expert_num_tokens"] = ((e,), torch.int32)
        for name, (shape, dtype) in want.items():
            found = () if name in tensors else (Finding(Stage.COMBINE, name, "was not returned", rank=rank),)
            if name in tensors and (tuple(tensors[name].shape), tensors[name].dtype) != (shape, dtype):
                words = f"is {tuple(tensors[name].shape)} {tensors[name].dtype}, must be {shape} {dtype}"
                stage = Stage.COMBINE if name == "out" else Stage.DISPATCH
                found = (Finding(stage, name, words, rank=rank),)
            parts.append(Comparison(found, 2, 0.0))
    return {"shapes": _merged(parts)}


def _counts(expect: WorldExpectation, shown: Sequence[Shown], _: list[Matched]) -> dict[str, Comparison]:
    parts = []
    for rank, (view, tensors) in enumerate(zip(expect.ranks, shown, strict=True)):
        if "expert_num_tokens" not in tensors:
            continue
        got, want = tensors["expert_num_tokens"].cpu(), view.counts
        found = []
        if not torch.equal(got, want):
            index = int((got != want).nonzero()[0])
            words = f"local expert {index} counts {int(got[index])} pairs, must be {int(want[index])}"
            expert = expect.world.grid.local(rank)[index]
            bad = int((got != want).sum())
            found.append(
                Finding(Stage.DISPATCH, "expert_num_tokens", words, expert=expert, rank=rank, bad=bad, total=len(want))
            )
        parts.append(Comparison(tuple(found), len(want), 0.0))
    return {"expert_num_tokens": _merged(parts)} if parts else {}


def _rows(expect: WorldExpectation, shown: Sequence[Shown], matched: list[Matched]) -> dict[str, Comparison]:
    """Rows and their scales on bits, or what must be sent of x where QUANT1 comes before dispatch."""
    if not all(_shows_rows(tensors) for tensors in shown):
        return {}
    for rank, tensors in enumerate(shown):
        matched.append(match_rows(rank, expect.sources, tensors, expect.world.grid.local(rank)))
    return {"rows": _merged([Comparison(m.findings, m.checked, 0.0) for m in matched])}


def _shows_rows(tensors: Shown) -> bool:
    if "rows" not in tensors:
        return False
    return "row_ids" in tensors or ("expert_num_tokens" in tensors and tensors["rows"].dim() == 3)


def _experts(expect: WorldExpectation, shown: Sequence[Shown], matched: list[Matched]) -> dict[str, Comparison]:
    """What each rank's experts made of the rows it received, whoever sent them."""
    if not matched:
        return {}
    parts = []
    for rank, (view, tensors) in enumerate(zip(expect.ranks, shown, strict=True)):
        parts += judge_experts(rank, view, tensors, matched[rank], expect.claims)
    return {"y": _merged(parts)} if parts else {}


def _out(expect: WorldExpectation, shown: Sequence[Shown], matched: list[Matched]) -> dict[str, Comparison]:
    wants = _isolated(expect, shown, matched) or [view.out for view in expect.ranks]
    parts = []
    for rank, (want, tensors) in enumerate(zip(wants, shown, strict=True)):
        judged = counted(compare("out", tensors["out"], want), "out", tensors["out"], want)
        parts.append(replace(judged, findings=tuple(replace(f, rank=rank) for f in judged.findings)))
    return {"out": _merged(parts)}


def _isolated(expect: WorldExpectation, shown: Sequence[Shown], matched: list[Matched]) -> list[Value]:
    """COMBINE from the candidate's own y of all ranks; empty where some rank's y is not shown though pairs went there."""
    world = expect.world
    if not matched or any(m.places and "y" not in t for m, t in zip(matched, shown, strict=True)):
        return []
    p = expect.whole.problem
    if p.latent:
        return []
    homes = [home_inputs(inputs) for inputs in expect.inputs]
    came_back = [
        [torch.zeros(*h.topk_ids.shape, p.H, dtype=torch.float64, device=h.device) for _ in range(world.tp)] for h in homes
    ]
    for rank, (m, tensors) in enumerate(zip(matched, shown, strict=True)):
        if not m.places:
            continue
        pairs = sorted(m.places)
        flat = gathered(tensors["y"], m, pairs)
        assert flat is not None
        for pair, row in zip(pairs, flat.double(), strict=True):
            came_back[pair.source][world.grid.tp_rank(rank)][pair.token, pair.slot] = row
    return [
        combine_shards(home, ys, format_of(tensors["out"].dtype), expect.claims)
        for home, ys, tensors in zip(homes, came_back, shown, strict=True)
    ]


def check_conservation(expect: WorldExpectation, shown: Sequence[Shown]) -> list[Finding]:
    """Pairs sent == pairs counted, per expert over the whole world and per rank: nothing is lost and nothing made up.

    A candidate that shows counts only is held to this, when its rows cannot be matched.
    """
    world, findings = expect.world, []
    sent = torch.zeros(world.grid.experts, dtype=torch.int64)
    for inputs in expect.inputs:
        ids = inputs.topk_ids[(inputs.topk_ids >= 0) & (inputs.topk_ids < world.grid.experts)].long().cpu()
        sent += torch.bincount(ids, minlength=world.grid.experts)
    computed = torch.zeros_like(sent)
    for rank, tensors in enumerate(shown):
        computed[world.grid.local(rank)] += tensors["expert_num_tokens"].long().cpu()
    for expert in (computed != sent * world.tp).nonzero().flatten().tolist():
        words = f"{int(sent[expert])} pairs were routed to it on all ranks, {int(computed[expert])} were computed"
        holder = world.grid.holders(expert)[0]
        findings.append(Finding(Stage.DISPATCH, "expert_num_tokens", words, expert=expert, rank=holder))
    return findings


def check_same_bits(name: str, got: Sequence[Tensor], want: Sequence[Tensor], other: str) -> list[Finding]:
    """Two runs that must agree bit for bit, rank by rank. `other` says what the second one was."""
    findings = []
    for rank, (a, b) in enumerate(zip(got, want, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            words = f"is {tuple(a.shape)} {a.dtype}, {other} {tuple(b.shape)} {b.dtype}"
            findings.append(Finding(Stage.COMBINE, name, words, rank=rank))
        elif bool((bad := _bits(a) != _bits(b)).any()):
            token = int(bad.flatten(1).any(dim=1).nonzero()[0])
            words = f"differs in bits from {other}"
            findings.append(Finding(Stage.COMBINE, name, words, token=token, rank=rank, bad=int(bad.sum()), total=bad.numel()))
    return findings


def _bits(x: Tensor) -> Tensor:
    return x.detach().cpu().clone(memory_format=torch.contiguous_format).view(torch.uint8)


def without_dispatch(world: World, out: Tensor) -> list[Tensor]:
    """Every rank's rows of a single-rank result `out` (T, H)."""
    return [out[world.rows(rank)] for rank in range(world.ranks)]


def permuted(world: World, whole: Inputs, order: Sequence[int]) -> tuple[World, Inputs]:
    """The same world with the tokens of rank order[r] on rank r; experts stay where they are.

    Which rank a token is on must not matter: outputs permute with it. Replicas excepted, which are chosen by rank.
    """
    if sorted(order) != list(range(world.ranks)) or not world.distinct:
        raise ValueError(f"order {list(order)} must name each of {world.ranks} ranks once, and no token may be on two")
    index = torch.cat([torch.arange(world.rows(r).start, world.rows(r).stop, device=whole.device) for r in order])
    by_token: Mapping[str, Tensor | None] = {
        name: getattr(whole, name) for name in ("hidden_states", "topk_ids", "topk_weights", "logits", "table_ids")
    }
    moved = whole.map({name: t[index] for name, t in by_token.items() if t is not None})
    return replace(world, tokens=tuple(world.tokens[r] for r in order)), moved


def fitting_capacity(ranks: Sequence[RankExpectation]) -> int:
    """The least rows per expert that hold this call: with one fewer it must be refused, and never cut off."""
    return max((int(view.counts.max()) for view in ranks), default=0)
