"""Planted faults of several ranks: the reference's pairs with one step wrong, as candidates that every rank loads by name.

    moeproof verify moeproof.harness.faults.on_ranks:P26 --case T=9,H=20,I=13,E=7,K=3,ranks=3 --transport gloo

NAME is the pair with its fault, NAME_twin the same edit that never fires. Ids are those of docs/faults.md; single-rank
classes are in harness.faults.catalogue.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from moeproof.harness.faults import rank_steps as steps
from moeproof.harness.faults.rank_steps import Here, Shared
from moeproof.harness.verdict import Outcome
from moeproof.reference.contract.candidate import RankPair
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.link import Link
from moeproof.reference.contract.stages import Stage
from moeproof.reference.contract.world import World
from moeproof.reference.eager.candidates import candidates

HERE = "moeproof.harness.faults.on_ranks"
SIZES = "T=9,H=20,I=13,E=7,K=3"
FAIL, FLAKY = (Outcome.FAIL,), (Outcome.FLAKY,)
STUCK = (Outcome.TIMEOUT, Outcome.FAIL, Outcome.ERROR)
"""Collectives that differ hang, abort a process or go through, as the transport takes them; each is told."""


@dataclass(frozen=True)
class RankFault:
    """One class, planted in one step of a pair."""

    name: str
    """Its id in the catalogue, where it has one."""
    what: str
    pair: str
    """The reference's pair that it is planted in."""
    step: str
    """Method of prepare/finalize, `apply` of the experts, `forward` of the kernel, or `link`: every collective."""
    wrong: Callable[..., Any]
    """wrong(right, here, *arguments) in the place of right(*arguments); for `link` wrong(link, here) -> link."""
    line: str = ""
    """What the case needs to trigger it, beyond SIZES."""
    stage: Stage | None = Stage.DISPATCH
    """Of the first finding; None where there is no stage."""
    where: str = "all"
    """Ranks that may be named: all, last, others (all but the first), first, one (rank 1), empty (those without tokens)."""
    outcomes: tuple[Outcome, ...] = FAIL
    twin: Outcome = Outcome.PASS
    """What the reference itself makes of the case; it refuses ids that no expert has."""
    processes_only: bool = False
    cpu_only: bool = False
    shared: bool = False
    """The pair adds a replicated shared expert of its own."""

    @property
    def hangs(self) -> bool:
        return Outcome.TIMEOUT in self.outcomes

    def ranks(self, world: World) -> list[int]:
        """The ranks of `where`."""
        every = list(range(world.ranks))
        return {
            "all": every,
            "last": every[-1:],
            "first": every[:1],
            "others": every[1:],
            "one": [1],
            "empty": [r for r in every if world.tokens[r] == 0],
            "shard 0": every[:: world.tp],
        }[self.where]


FAULTS: tuple[RankFault, ...] = (
    RankFault(
        "P19", "id -1 wraps to the last expert", "eager-alltoall", "prepare", steps.wraps, "routing=minus1", where="last"
    ),
    RankFault(
        "P20",
        "global ids on the local list of experts; rank 0 right",
        "eager-allgather",
        "apply",
        steps.global_ids,
        stage=Stage.GEMM2,
        where="others",
    ),
    RankFault("P21", "index map read as a mask", "eager-alltoall", "apply", steps.map_as_mask, stage=Stage.GEMM2),
    RankFault("P22", "rows above a capacity dropped", "eager-alltoall", "prepare", steps.truncates, "routing=hot"),
    RankFault("P23", "a row spills into the next region", "eager-batched-alltoall", "prepare", steps.spills),
    RankFault(
        "P24",
        "scales stay where rows move",
        "eager-alltoall",
        "prepare",
        steps.scales_stay,
        "H=64,I=64,scheme=fp8_token,values=hetero",
    ),
    RankFault(
        "P25",
        "scales laid out the other way after the exchange",
        "eager-alltoall",
        "prepare",
        steps.scales_row_major,
        "H=64,I=64,scheme=mxfp8,values=groups",
    ),
    RankFault("P26", "old ids behind the received rows", "eager-alltoall", "prepare", steps.tail_ids, where="last"),
    RankFault("P27", "only the first slot is sent", "eager-allgather", "prepare", steps.first_slot),
    RankFault(
        "P28",
        "ids >= E not filtered",
        "eager-alltoall",
        "prepare",
        steps.unfiltered,
        "routing=beyond",
        twin=Outcome.UNSUPPORTED,
    ),
    RankFault(
        "P61",
        "bias of GEMM2 counted on every shard",
        "eager-alltoall",
        "apply",
        steps.bias_again,
        "ranks=4,tp=2,expert_bias=1,values=normal",
        stage=Stage.GEMM2,
        where="shard 0",
    ),
    RankFault(
        "P69",
        "a rank without tokens returns another shape",
        "eager-alltoall",
        "forward",
        steps.empty_shape,
        "spread=one",
        stage=Stage.COMBINE,
        where="empty",
    ),
    RankFault(
        "P70",
        "weights on input and again on output",
        "eager-allgather",
        "finalize",
        steps.weights_again,
        "K=1,weight_on_input=1,values=normal",
        stage=Stage.COMBINE,
    ),
    RankFault(
        "P71",
        "the shared expert enters on every rank",
        "eager-alltoall",
        "forward",
        steps.shared_times_ranks,
        "shared=16,shared_gate=1",
        stage=Stage.COMBINE,
        shared=True,
    ),
    RankFault("P72", "a complete sum reduced again", "eager-alltoall", "finalize", steps.reduces_again, stage=Stage.COMBINE),
    RankFault(
        "P73",
        "routed scaling applied twice",
        "eager-allgather",
        "finalize",
        steps.scales_again,
        "router=sigmoid:scale=2.5",
        stage=Stage.COMBINE,
    ),
    RankFault(
        "P74",
        "each addition rounded to bf16",
        "eager-alltoall",
        "finalize",
        steps.bf16_sum,
        "T=24,H=64,K=6,values=normal",
        stage=Stage.COMBINE,
    ),
    RankFault(
        "P75",
        "another order of addition in every call",
        "eager-alltoall",
        "finalize",
        steps.any_order,
        "K=5,dtype=fp32,values=normal",
        stage=Stage.COMBINE,
        outcomes=FLAKY,
    ),
    RankFault("P76", "a row read before it arrived, p = 0.3", "eager-alltoall", "prepare", steps.late_row, where="one"),
    RankFault("P77", "the accumulator is not cleared", "eager-allgather", "finalize", steps.accumulates, stage=Stage.COMBINE),
    RankFault(
        "P78",
        "a rank without tokens skips every second combine",
        "eager-alltoall",
        "finalize",
        steps.idle_skips,
        "spread=empty",
        where="empty",
        outcomes=STUCK,
    ),
    RankFault(
        "P79",
        "algorithm chosen by the own token count",
        "eager-alltoall",
        "prepare",
        steps.local_choice,
        "spread=one",
        where="last",
        outcomes=STUCK,
    ),
    RankFault(
        "P80",
        "number of chunks from the own token count",
        "eager-alltoall",
        "prepare",
        steps.local_chunks,
        "spread=one",
        where="last",
        outcomes=STUCK,
    ),
    RankFault("P81", "the row is there before its weight", "eager-alltoall", "prepare", steps.stale_weight, where="one"),
    RankFault(
        "P82",
        "one staging slot for two micro-batches",
        "eager-alltoall-overlapped",
        "link",
        steps.OneSlot,
        stage=Stage.COMBINE,
        outcomes=(Outcome.FAIL, Outcome.ERROR),
    ),
    RankFault("P83", "rows that fill up are not cleared", "eager-allgather", "prepare", steps.padding, "spread=uneven"),
    RankFault(
        "P88", "hidden_states overwritten on rank 1", "eager-alltoall", "prepare", steps.overwrites, stage=None, where="one"
    ),
    RankFault(
        "P89",
        "strides ignored on rank 1",
        "eager-alltoall",
        "prepare",
        steps.ignores_strides,
        "strided=1,spread=even",
        where="all",
    ),
    RankFault(
        "P92",
        "the routing of the captured call is kept",
        "eager-allgather",
        "prepare",
        steps.baked,
        "history=graph",
        cpu_only=True,
    ),
    RankFault(
        "P96",
        "weights prepared once per shape",
        "eager-alltoall",
        "apply",
        steps.caches_weights,
        "history=interleave",
        stage=Stage.GEMM2,
    ),
    RankFault(
        "short_exchange", "a row fewer than declared", "eager-alltoall", "link", steps.ShortSend, outcomes=STUCK, where="one"
    ),
    RankFault(
        "stalls",
        "rank 1 never comes",
        "eager-alltoall",
        "apply",
        steps.stalls,
        outcomes=STUCK,
        where="one",
        processes_only=True,
    ),
    RankFault(
        "dies",
        "kill -9 of rank 1",
        "eager-alltoall",
        "apply",
        steps.dies,
        outcomes=(Outcome.ERROR,),
        where="one",
        processes_only=True,
    ),
    RankFault("raises", "rank 1 raises", "eager-alltoall", "apply", steps.raises, outcomes=(Outcome.ERROR,), where="one"),
)
BY_NAME = {fault.name: fault for fault in FAULTS}


def __getattr__(name: str) -> RankPair:
    """The pair with the fault NAME, or the twin of it, NAME_twin."""
    fault, _, twin = name.partition("_twin")
    if fault not in BY_NAME or twin:
        raise AttributeError(f"no fault of ranks is called '{name}'")
    return planted(BY_NAME[fault], armed=not name.endswith("_twin"))


def planted(fault: RankFault, armed: bool) -> RankPair:
    """The pair as a candidate, with what goes wrong in it; not armed it is right."""
    right = next(c for c in candidates() if isinstance(c, RankPair) and c.name == fault.pair)

    def prepare_finalize(inputs: Inputs, world: World, link: Link) -> Any:
        here = Here(link.rank, world, link, armed, inputs.problem)
        pf: Any = right.prepare_finalize(inputs, world, fault.wrong(link, here) if fault.step == "link" else link)
        pf.here = here
        if fault.step in ("prepare", "finalize"):
            setattr(pf, fault.step, here.instead(getattr(pf, fault.step), fault.wrong))
        return pf

    def experts(inputs: Inputs) -> Any:
        made: Any = right.experts(inputs)
        made.shared = Shared(inputs) if fault.shared else None
        if fault.step == "apply":
            here = Here(inputs.problem.ep_rank, None, None, armed, inputs.problem)
            made.apply = here.instead(made.apply, fault.wrong)
        return made

    class Kernel(right.kernel):  # type: ignore[name-defined]
        """The pair's kernel, with the shared expert where the fault needs one."""

        def forward(self, *arguments: Any, **options: Any) -> Any:
            if fault.step != "forward":
                return self.plain(*arguments, **options)
            here = self.prepare_finalize.here
            return here.instead(Kernel.plain, fault.wrong)(self, *arguments, **options)

        def plain(self, x: Any, *arguments: Any, **options: Any) -> Any:
            out = super().forward(x, *arguments, **options)
            shared = self.fused_experts.shared
            return out if shared is None else (out.float() + shared(x)).to(out.dtype)

    def supports(world: World) -> str | None:
        p = world.problem
        plain = replace(world, problem=replace(p, shared=0, shared_gate=False)) if fault.shared else world
        return right.supports(plain)

    return replace(
        right,
        name=fault.name if armed else f"{fault.name}_twin",
        prepare_finalize=prepare_finalize,
        experts=experts,
        kernel=Kernel,
        supports=supports,
    )
