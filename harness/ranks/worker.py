"""A rank process: joins the group once, then runs one function after the other."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
import time
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from moeproof.harness.ranks.process import tie_to_pool
from moeproof.harness.ranks.transport import Placement

GROUP_TIMEOUT = datetime.timedelta(hours=1)
"""Of the process group: far beyond any deadline, because its own message names no rank. The pool's watchdog decides."""

LONGEST = 300
"""Characters of an exception's first line."""


@dataclass(frozen=True)
class Spec:
    """What a rank must know to start."""

    rank: int
    world_size: int
    placement: Placement
    folder: Path
    record: bool


@dataclass(frozen=True)
class Reply:
    """What a rank says when its function has come to an end."""

    error: str = ""
    """Name and message of the exception; empty where it returned."""
    result: bytes = b""
    stack: tuple[str, ...] = ()
    when: float = 0.0
    """Monotonic clock, which all processes of a machine share."""
    refused: bool = False
    """The exception is a ContractError."""
    broken: bool = False
    """This process cannot go on: its CUDA context is lost."""


def journal_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.journal"


def stack_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.stack"


def output_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.output"


def main(spec: Spec, pool: Connection) -> None:
    """The life of a rank."""
    tie_to_pool()
    os.environ.update(spec.placement.environment)
    _redirect(output_file(spec.folder, spec.rank))
    with stack_file(spec.folder, spec.rank).open("w") as stacks:
        faulthandler.enable(stacks)  # a segfault or abort leaves its stack there
        faulthandler.register(signal.SIGUSR1, stacks)  # and so does the pool's question where this rank is
        _serve(spec, pool)


def _redirect(path: Path) -> None:
    """What the rank and the libraries under it print goes to a file: it belongs to the diagnosis, not among the verdicts."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


def _serve(spec: Spec, pool: Connection) -> None:
    import torch
    import torch.distributed as dist

    from moeproof.harness.ranks import journal, record, wire

    torch.set_num_threads(1)
    book = journal.Journal(journal_file(spec.folder, spec.rank))
    if spec.record:
        record.install(book)
        journal.attach(book)
    try:
        device = torch.device(spec.placement.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            spec.placement.backend,
            init_method=(spec.folder / "group").as_uri(),
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=GROUP_TIMEOUT,
            device_id=device if spec.placement.backend == "nccl" else None,
        )
        pool.send_bytes(wire.dumps(Reply()))
    except Exception as error:  # a rank that cannot start says why
        pool.send_bytes(wire.dumps(_raised(error, broken=True)))
        return
    while True:
        try:
            message = pool.recv_bytes()
        except EOFError:  # the pool is gone
            return
        if not message:
            break
        book.reset()
        pool.send_bytes(wire.dumps(_run(spec, message)))
    # Without the barrier a fast rank would leave while another still connects to it.
    journal.attach(None)
    dist.barrier()
    dist.destroy_process_group()


def _run(spec: Spec, message: bytes) -> Reply:
    import torch

    from moeproof.harness.ranks import wire
    from moeproof.harness.ranks.context import RankContext, rank_seed

    device = torch.device(spec.placement.device)
    try:
        function, arguments, seed = wire.loads(message)
        own = rank_seed(seed, spec.rank)
        torch.manual_seed(own)
        context = RankContext(spec.rank, spec.world_size, device, spec.placement.transport, own)
        result: Any = function(context, *arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a collective that is only queued has not happened yet
        return Reply(result=wire.dumps(result), when=time.monotonic())
    except Exception as error:  # whatever it raises ends in a verdict
        return _raised(error, _lost(device))


def _lost(device: Any) -> bool:
    """Whether the CUDA context is beyond use."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def _raised(error: Exception, broken: bool) -> Reply:
    from moeproof.reference.contract.errors import ContractError

    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.endswith((__file__, "ranks/record.py", "c10d_logger.py"))]
    first = str(error).strip().split("\n")[0][:LONGEST] or "no message"
    return Reply(
        error=f"{type(error).__name__}: {first}",
        stack=tuple(f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in own),
        when=time.monotonic(),
        refused=isinstance(error, ContractError),
        broken=broken,
    )
