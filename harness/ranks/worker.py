"""A rank process: joins the group once, then runs one function after the other."""

from __future__ import annotations

import datetime
import faulthandler
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

from moeproof.harness.ranks import wire
from moeproof.harness.ranks.journal import Journal, attach
from moeproof.harness.ranks.process import tie_to_pool
from moeproof.harness.ranks.record import install
from moeproof.harness.ranks.runner import Reply, raised, run_function
from moeproof.harness.ranks.transport import Placement

GROUP_TIMEOUT = datetime.timedelta(hours=1)
"""Of the process group: far beyond any deadline, because its own message names no rank. The pool's watchdog decides."""


@dataclass(frozen=True)
class Spec:
    """What a rank must know to start."""

    rank: int
    world_size: int
    placement: Placement
    folder: Path
    record: bool


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
    if spec.placement.device != "cpu":
        os.environ.pop("TRITON_INTERPRET", None)  # the pool's process may interpret; this one has a GPU to work on
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
    torch.set_num_threads(1)
    device = torch.device(spec.placement.device)
    book = Journal(journal_file(spec.folder, spec.rank))
    attach(book)
    if spec.record:
        install(book)
    try:
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
        pool.send_bytes(wire.dumps(raised(error, broken=True)))
        return
    while True:
        try:
            message = pool.recv_bytes()
        except EOFError:  # the pool is gone
            return
        if not message:
            break
        book.reset()
        pool.send_bytes(wire.dumps(_run(spec, device, message)))
    # Without the barrier a fast rank would leave while another still connects to it.
    dist.barrier()
    dist.destroy_process_group()


def _run(spec: Spec, device: torch.device, message: bytes) -> Reply:
    try:
        function, arguments, seed = wire.loads(message)
    except Exception as error:  # the function's module cannot be imported here
        return raised(error, broken=False)
    return run_function(spec.rank, spec.world_size, device, spec.placement.transport, function, arguments, seed)
