"""Plantings that only a GPU can trigger: layers that are right call by call, and wrong on a side stream or in a captured graph.

The layer decides nothing on the host, so that it can be captured: every expert for every token, weighted with 0 where it is
not chosen. Each planting is a fault of stream or graph in it; unarmed it is the neutral twin, which runs the same branch and
does what the healthy layer would do. Without a GPU they count as planted, and are not run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moeproof.harness.cases.case import Case, parse_case
from moeproof.harness.faults.fault import Witness
from moeproof.harness.faults.hunt import Hunt, Watch
from moeproof.harness.judging.judge import judge
from moeproof.harness.shrinking.shrink import Shrunk, search
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract.candidate import Candidate
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.problem import Problem
from moeproof.reference.contract.stages import Stage

Tensor = torch.Tensor
Shown = dict[str, Tensor]
CASE = parse_case("T=17,H=64,I=32,E=5,K=2,seed=3")


class Dense:
    """A step a method, each on every expert; a fault overrides one. Shows gate_up, h, y and out."""

    def __init__(self, armed: bool, witness: Witness) -> None:
        self.armed, self.witness = armed, witness
        self.kept: dict[str, Tensor] = {}
        """What lives on from call to call."""

    def __call__(self, i: Inputs) -> Shown:
        ids = self.ids(i)
        gate_up = torch.einsum("th,enh->ten", i.hidden_states.float(), i.w1.float())
        gate, up = gate_up.chunk(2, dim=-1)
        h = self.stored(torch.nn.functional.silu(gate) * up)
        y = self.scaled(torch.einsum("tei,ehi->teh", h, i.w2.float()))
        shown = {name: _slots(t, ids) for name, t in (("gate_up", gate_up), ("h", h), ("y", y))}
        out = self.summed(y, ids, i.topk_weights).to(i.hidden_states.dtype)
        return shown | {"out": self.returned(out)}

    def ids(self, i: Inputs) -> Tensor:
        """(T, K): what is routed."""
        return i.topk_ids

    def stored(self, h_TEI: Tensor) -> Tensor:
        """h where GEMM2 reads it."""
        return h_TEI

    def scaled(self, y_TEH: Tensor) -> Tensor:
        """y times a factor per expert, here 1."""
        return y_TEH

    def summed(self, y_TEH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """(T, H): the chosen experts' rows with their weights. Weights of slots that are not routed may be NaN."""
        mine = ids[:, :, None] == torch.arange(y_TEH.shape[1], device=ids.device)
        w_TE = torch.where(mine, weights[:, :, None], 0.0).sum(dim=1)
        return (y_TEH * w_TE[:, :, None]).sum(dim=1)

    def returned(self, out: Tensor) -> Tensor:
        return out

    def captured(self) -> bool:
        """Whether this call is being captured; the witness counts those."""
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self.witness.fired += capturing
        return capturing


def _slots(t_TEX: Tensor, ids_TK: Tensor) -> Tensor:
    """(T, K, X): of each token the rows of its experts."""
    index = ids_TK.clamp(0, t_TEX.shape[1] - 1).long()[:, :, None]
    return t_TEX.gather(1, index.expand(-1, -1, t_TEX.shape[2]))


class WrongStream(Dense):
    """P91: the last kernel goes to the default stream, whatever the caller's is."""

    def returned(self, out: Tensor) -> Tensor:
        if not out.is_cuda:
            return out
        own, default = torch.cuda.current_stream(), torch.cuda.default_stream()
        self.witness.fired += own != default
        result = torch.empty_like(out)
        with torch.cuda.stream(default if self.armed else own):
            result.copy_(out)
        return result


class Baked(Dense):
    """P92: what the host saw in the first call serves every replay."""

    def ids(self, i: Inputs) -> Tensor:
        first = self.kept.setdefault("ids", i.topk_ids.clone())
        return first if self.captured() and self.armed else i.topk_ids


class FreedTable(Dense):
    """P93: a table that the first call uploaded; its owner lets go of it once the graph has its address."""

    def scaled(self, y_TEH: Tensor) -> Tensor:
        scales = self.kept.get("scales")
        if scales is None or scales.shape[0] != y_TEH.shape[1]:
            scales = self.kept["scales"] = torch.ones(y_TEH.shape[1], 1, device=y_TEH.device)
        y = y_TEH * scales
        if self.captured() and self.armed:
            self.kept.clear()
        return y


class FreedWorkspace(Dense):
    """P93: the workspace of h is freed after the capture. Each replay writes it anew, so only its next owner is hurt."""

    def stored(self, h_TEI: Tensor) -> Tensor:
        h = self.kept.get("h")
        if h is None or h.shape != h_TEI.shape:
            h = self.kept["h"] = torch.empty_like(h_TEI)
        h.copy_(h_TEI)
        if self.captured() and self.armed:
            self.kept.clear()  # what the caller of this step holds is gone by the end of the call
        return h


class FlagNotReset(Dense):
    """P94: the host resets the flag that lets rows pass, which no replay does: odd rows are those of the call before."""

    def summed(self, y_TEH: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        out = super().summed(y_TEH, ids, weights)
        if "rows" not in self.kept or self.kept["rows"].shape != out.shape:
            self.kept["rows"], self.kept["flag"] = torch.zeros_like(out), torch.zeros((), device=out.device)
        rows, flag = self.kept["rows"], self.kept["flag"]
        if not (self.captured() and self.armed):
            flag.zero_()
        odd = (torch.arange(out.shape[0], device=out.device) % 2 == 1)[:, None]
        late = torch.where(odd & (flag > 0), rows, out)
        rows.copy_(out)
        flag.fill_(1.0)
        return late


@dataclass(frozen=True)
class Planting:
    """A variant of a class; `history` is what a case must have to trigger it, `blame` as in Fault."""

    id: str
    variant: str
    history: str
    layer: type[Dense]
    blame: tuple[Stage | None, ...]

    @property
    def label(self) -> str:
        return f"{self.id} {self.variant}"

    def candidate(self, armed: bool = True) -> tuple[Candidate, Witness]:
        """The layer with the fault in it, or the neutral twin, and what counts how often the faulty branch ran."""
        witness = Witness()
        name = self.label.replace(" ", "-")
        return Candidate(name, self.layer(armed, witness), ("gate_up", "h", "y", "out"), _supports), witness


PLANTINGS = (
    Planting("P91", "default stream", "stream", WrongStream, (Stage.COMBINE,)),
    Planting("P92", "ids", "graph", Baked, (Stage.GEMM1,)),
    Planting("P93", "table read", "graph", FreedTable, (Stage.GEMM2,)),
    Planting("P93", "workspace written", "graph", FreedWorkspace, (None,)),
    Planting("P94", "host reset", "graph", FlagNotReset, (Stage.COMBINE,)),
)


def _supports(p: Problem) -> str | None:
    plain = Problem(T=p.T, H=p.H, I=p.I, E=p.E, K=p.K, dtype=p.dtype, router=p.router, storage=p.storage)
    routed = not (p.router.zero_experts or p.router.fused_shared)
    return None if p == plain and routed else "this layer is plain: silu, one rank, nothing shared"


def hunt_on_gpu(planted: Planting, case: Case = CASE) -> Hunt:
    """The planting without and with its history. It counts as caught where it passes the first and fails the second.

    The twin sees the same two cases. Raises ContractError where torch sees no GPU.
    """
    check(torch.cuda.is_available(), "stream and graph faults need an NVIDIA GPU, and torch sees none")
    watch, result = Watch(), Hunt(planted.id, planted.variant)
    cases = (replace(case, history="none"), replace(case, history=planted.history))
    thing, witness = planted.candidate()
    quiet, verdict = (judge(thing, one, "cuda") for one in cases)
    if witness.fired and quiet.outcome is Outcome.PASS and verdict.outcome is Outcome.FAIL:
        first = verdict.findings[0]
        result = replace(result, caught=True, right_stage=first.stage in planted.blame, needed=1, finding=str(first))
    twin, _ = planted.candidate(armed=False)
    twins = [judge(twin, one, "cuda") for one in cases]
    return replace(
        result,
        triggered=witness.fired > 0,
        at=str(cases[1]),
        case=str(cases[1]),
        outcome=str(verdict.outcome),
        twin_checks=len(twins),
        twin_alarms=tuple(str(v) for v in twins if v.outcome is not Outcome.PASS),
        seconds=watch.wall,
        cpu_seconds=watch.cpu,
    )


def shrunk_on_gpu(planted: Planting, case: Case = CASE, seconds: float = 20.0) -> Shrunk:
    """The case with its history shrunk; each attempt is a fresh layer."""
    start = replace(case, history=planted.history)
    return search(planted.label, lambda c, _: judge(planted.candidate()[0], c, "cuda"), start, max_seconds=seconds)
