"""The transports: what carries the bytes between ranks, and where each runs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from moeproof.reference.contract.candidate import TRANSPORTS
from moeproof.reference.contract.errors import check, known


@dataclass(frozen=True)
class Placement:
    """Where one rank runs, and with what."""

    transport: str
    backend: str
    device: str
    environment: dict[str, str] = field(default_factory=dict)


def unavailable(transport: str, world_size: int) -> str | None:
    """Why this transport cannot serve so many ranks on this machine, or None."""
    known("transport", transport, TRANSPORTS)
    if transport == "simulated":
        return None
    if not dist.is_available():
        return "this torch is built without torch.distributed"
    gpus = torch.cuda.device_count()
    if transport == "symm" and not gpus:
        return "transport symm needs an NVIDIA GPU: symmetric memory has no CPU form"
    if transport == "nccl" and not dist.is_nccl_available():
        return "transport nccl needs a torch built with NCCL"
    if transport == "nccl" and gpus < world_size:
        return f"transport nccl needs one GPU per rank: {world_size} ranks, {gpus} GPUs; NCCL refuses two ranks on one"
    return None


def place(transport: str, world_size: int, rank: int) -> Placement:
    """Device, backend and environment of a rank of a pool on this machine. Raises ContractError where it cannot be."""
    check(transport != "simulated", "simulated ranks are plain functions in one process; a pool needs gloo, symm or nccl")
    reason = unavailable(transport, world_size)
    check(reason is None, str(reason))
    # All ranks are on this host: the loopback interface exists wherever the host's name may point.
    environment = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if transport == "gloo":
        return Placement(transport, "gloo", "cpu", environment)
    gpus = torch.cuda.device_count()
    if transport == "symm":
        if world_size > gpus:
            # Without it torch refuses to map a peer's memory that lies on the same GPU.
            environment["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        return Placement(transport, "gloo", f"cuda:{rank % gpus}", environment)
    return Placement(transport, "nccl", f"cuda:{rank}", environment)
