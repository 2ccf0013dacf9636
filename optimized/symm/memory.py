"""One buffer of bytes on every rank that all ranks can write into: torch's symmetric memory, or files that processes share.

The second form is the first one's stand-in on a CPU: each process maps the files of all ranks and so has its own table of
their addresses, as with peer memory of GPUs. Kernels see no difference.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.link import Link

Tensor = torch.Tensor
NAME = 256
"""Bytes of a file name that travels."""


def allocate(link: Link, nbytes: int) -> tuple[tuple[Tensor, ...], object]:
    """Collective: uint8 (nbytes,) of every rank in rank order, as this process can reach them, and what keeps them mapped.

    This rank's own is cleared. Nobody may write into them before another collective has followed: a peer may still be
    clearing its own.
    """
    check(
        link.group is not None,
        "one-sided puts need processes: ranks that are threads of one process have no memory of each other to map",
    )
    arenas, mapping = _on_gpus(link, nbytes) if link.device.type == "cuda" else (_in_files(link, nbytes), None)
    arenas[link.rank].zero_()
    return arenas, mapping


def _on_gpus(link: Link, nbytes: int) -> tuple[tuple[Tensor, ...], object]:
    import torch.distributed._symmetric_memory as symmetric

    assert link.group is not None
    own = symmetric.empty(nbytes, dtype=torch.uint8, device=link.device)
    handle = symmetric.rendezvous(own, link.group.group_name)
    peers = [own if rank == link.rank else handle.get_buffer(rank, (nbytes,), torch.uint8) for rank in range(link.size)]
    return tuple(peers), handle


def _in_files(link: Link, nbytes: int) -> tuple[Tensor, ...]:
    memory = Path("/dev/shm")  # files that never reach a disk, where the system has them
    with tempfile.TemporaryDirectory(prefix="moeproof-symm-", dir=memory if memory.is_dir() else None) as folder:
        path = str(Path(folder) / f"rank{link.rank}")
        own = _mapped(path, nbytes)
        name = path.encode()
        check(len(name) <= NAME, f"the temporary folder's name is too long to travel: {path}")
        names = link.all_gather(torch.frombuffer(bytearray(name.ljust(NAME, b"\0")), dtype=torch.uint8))
        paths = [row.numpy().tobytes().rstrip(b"\0").decode() for row in names]
        arenas = tuple(own if rank == link.rank else _mapped(p, nbytes) for rank, p in enumerate(paths))
        link.all_gather(torch.zeros(1, dtype=torch.uint8))  # all have mapped all: names are not needed any more
    return arenas


def _mapped(path: str, nbytes: int) -> Tensor:
    storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
