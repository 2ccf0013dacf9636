"""`moeproof verify --ranks N`: every installed (or named) candidate for several ranks over cases on N of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from moeproof.harness import modes, workers
from moeproof.harness.cases.case import Case
from moeproof.harness.ranks import torchrun
from moeproof.harness.ranks.session import RankSession
from moeproof.harness.registry import find_rank_pairs, load_rank_pairs
from moeproof.harness.reports import report
from moeproof.harness.verdict import Verdict
from moeproof.reference.contract.candidate import TRANSPORTS, RankPair
from moeproof.reference.contract.errors import ContractError, check, known

Work = list[tuple[str, Case]]
"""(label, case): the label is a model's name, or empty."""
TRANSPORT_CHOICES = ("auto", *TRANSPORTS)


def choose(transport: str, ranks: int) -> str:
    """`auto` is nccl where there is a GPU for each of the `ranks` of this host, symm where there is any, and gloo elsewhere."""
    known("transport", transport, TRANSPORT_CHOICES)
    if transport != "auto":
        return transport
    gpus = torch.cuda.device_count()
    return "nccl" if gpus >= ranks else "symm" if gpus else "gloo"


def settle(transport: str, mode: str) -> None:
    """Choose the mode of this process. Ranks of a pool choose their own: compiled on a GPU, interpreted without."""
    if transport == "simulated":
        workers.settle(mode)
        return
    device = transport in ("symm", "nccl")
    check(
        mode == "auto" or (mode == "device") == device,
        f"mode '{mode}' does not go with transport {transport}, which runs on {'GPUs' if device else 'the CPU'}",
    )
    torch.set_num_threads(1)
    if not device:
        modes.choose("interpret")


def wanted(ranks: int, work: Work) -> bool:
    """Whether this is about several ranks at all."""
    check(ranks >= 0, f"ranks={ranks} must not be negative")
    return bool(ranks) or torchrun.launched() or any(case.ranks > 1 for _, case in work)


def place(work: Work, ranks: int, strict: bool) -> tuple[Work, list[str]]:
    """(the same layers on `ranks` ranks, why some are left out). 0 ranks means as many as the case line says.

    `ep` of a single-rank case is one rank's view: here it follows from the ranks. Raises ContractError where a case line
    says otherwise, where nothing is left, and with `strict` for the first case that so many ranks cannot share.
    """
    placed: Work = []
    left_out: list[str] = []
    for label, case in work:
        check(case.ranks in (1, ranks) or not ranks, f"the case line has ranks={case.ranks}, and --ranks is {ranks}")
        if not ranks:
            placed.append((label, case))
            continue
        try:
            placed.append((label, replace(case.with_problem(ep=1, ep_rank=0), ranks=ranks)))
        except ContractError as error:
            if strict:
                raise
            left_out.append(f"{label or case}: {error}")
    check(bool(placed), f"no case can be shared by so many ranks; {left_out[0] if left_out else 'there was none'}")
    return placed, left_out


def named(names: Sequence[str]) -> list[tuple[str, RankPair]]:
    """(name that ranks can load it by, pair) of the named candidates, or of all installed."""
    if names:
        return list(zip(names, load_rank_pairs(names), strict=True))
    found = [(p.name, p) for p in find_rank_pairs()]
    check(bool(found), "no candidate for several ranks is installed; name one as module:attribute or file.py:attribute")
    return found


def main(
    names: Sequence[str],
    work: Work,
    ranks: int,
    transport: str,
    mode: str,
    deadline: float,
    json: bool,
    *,
    strict: bool,
    replay: bool = False,
) -> int:
    """The body of `verify --ranks` and of `replay` for a case on several ranks; the exit code.

    Raises ContractError before anything runs. Under torchrun rank 0 reports, and the others exit with 0.
    """
    check(deadline > 0, f"deadline={deadline:g} must be above 0 seconds")
    if torchrun.launched():
        ranks = ranks or int(os.environ["WORLD_SIZE"])
        check(ranks == int(os.environ["WORLD_SIZE"]), f"--ranks is {ranks}, torchrun started {os.environ['WORLD_SIZE']}")
    placed, left_out = place(work, ranks, strict)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if torchrun.launched() else max(case.ranks for _, case in placed)
    transport = choose(transport, here)
    settle(transport, mode)
    pairs = named(names)
    if torchrun.launched():
        verdicts = _under_torchrun(pairs, placed, transport, deadline)
        if int(os.environ["RANK"]):
            return len(list(verdicts))  # none
    else:
        verdicts = run(pairs, placed, transport, deadline)
    for words in dict.fromkeys(left_out):
        print(f"left out: {words}", file=sys.stderr)
    if replay:
        return report.replay(list(verdicts), json)
    return report.verify(report.progress(verdicts, len(pairs) * len(placed), json), placed, json)


def run(pairs: Sequence[tuple[str, RankPair]], work: Work, transport: str, deadline: float) -> Iterator[Verdict]:
    """Verdicts as they come, case by case."""
    sessions: dict[int, RankSession] = {}
    try:
        for _, case in work:
            if case.ranks not in sessions:
                sessions[case.ranks] = RankSession(case.ranks, transport, deadline)
            for name, pair in pairs:
                yield sessions[case.ranks].judge(name, pair, case)
    finally:
        for session in sessions.values():
            session.close()


def _under_torchrun(pairs: Sequence[tuple[str, RankPair]], work: Work, transport: str, deadline: float) -> Iterator[Verdict]:
    """Verdicts on rank 0; the other ranks take part and yield nothing."""
    world = torchrun.TorchrunWorld(transport, deadline)
    session = RankSession(world.world_size, transport, deadline, world)
    for _, case in work:
        for name, pair in pairs:
            if world.rank == 0:
                yield session.judge(name, pair, case)
            else:
                session.take_part(name, pair, case)
    session.close()
