"""Links between ranks: over a torch.distributed process group, or between threads of one process. See contract.link."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from moeproof.reference.contract.errors import ContractError, check
from moeproof.reference.contract.link import Link, Wait

Tensor = torch.Tensor


def poisoned(shape: Sequence[int], like: Tensor) -> Tensor:
    """A buffer whose every byte is 0xFF: NaN in each floating format, -1 in each integer. Nobody can take it for data."""
    flat = torch.full((*shape, like.element_size()), 0xFF, dtype=torch.uint8, device=like.device)
    return flat.view(like.dtype).view(*shape)


def either(name: str, before: str) -> Callable[..., Any]:
    """The collective under its name since torch 2.13, which warns of the one it had before."""
    return getattr(dist, name, None) or getattr(dist, before)


class GroupLink:
    """The ranks of a process group, numbered as the group numbers them. gloo for CPU tensors, gloo or NCCL for CUDA ones."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str = "cpu") -> None:
        self.group: dist.ProcessGroup | None = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device(device)

    def all_gather(self, x: Tensor) -> Tensor:
        out = poisoned((self.size, *x.shape), x)
        if x.numel():
            gather = either("all_gather_single", "all_gather_into_tensor")
            gather(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        out = poisoned((sum(receive), *rows.shape[1:]), rows)
        sent = rows.contiguous()
        work = dist.all_to_all_single(out, sent, list(receive), list(send), group=self.group, async_op=True)

        def wait(_alive: Tensor = sent) -> Tensor:  # what is sent must live until the exchange is over
            work.wait()
            return out

        return wait

    def reduce_scatter(self, x: Tensor) -> Tensor:
        out = poisoned(x.shape[1:], x)
        if x.numel():
            scatter = either("reduce_scatter_single", "reduce_scatter_tensor")
            scatter(out.view(-1), x.contiguous().view(-1), group=self.group)
        return out


class Apart(ContractError):
    """The ranks called different collectives, or with other sizes; `rank` differs from the majority."""

    def __init__(self, rank: int, words: str) -> None:
        super().__init__(words)
        self.rank = rank


class _Room:
    """Where threads meet: each lays down what it brings, and all look at it between two barriers."""

    def __init__(self, size: int, timeout: float) -> None:
        self.timeout = timeout
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.brought: list[Any] = [None] * size
        self.calls = [0] * size
        """Collectives that each rank has entered."""
        self.last = ["nothing"] * size
        self.left = [False] * size
        """The rank has come to its end."""

    def swap(self, rank: int, op: str, mine: object) -> list[Any]:
        """What every rank brought to its collective `op`. Raises ContractError where they did not call the same."""
        self.calls[rank] += 1
        self.last[rank] = op
        try:
            self.barrier.wait()  # everyone has taken what lay there before
            self.brought[rank] = op, mine
            self.barrier.wait()
        except threading.BrokenBarrierError as error:
            error.args = (self.words(),)
            raise
        ops = [name for name, _ in self.brought]
        if len(set(ops)) > 1:
            common = Counter(ops).most_common(1)[0][0]
            who = ", ".join(f"rank {r} calls {name}" for r, name in enumerate(ops))
            words = f"collective #{self.calls[rank] - 1}: {who}; they must call the same"
            raise Apart(next(r for r, name in enumerate(ops) if name != common), words)
        return [brought for _, brought in self.brought]

    def words(self) -> str:
        """Where every rank is, when they do not meet."""
        ranks = enumerate(zip(self.calls, self.last, self.left, strict=True))
        where = [f"rank {r} {'has left after' if gone else 'is at'} #{n - 1} {op}" for r, (n, op, gone) in ranks]
        return f"not all ranks came to a collective within {self.timeout:g} s: {', '.join(where)}"

    def missing(self) -> int | None:
        """The rank that the others wait for: the first that left, or is behind."""
        gone = [r for r, left in enumerate(self.left) if left]
        behind = min(range(len(self.calls)), key=lambda r: self.calls[r])
        if gone:
            return gone[0]
        return behind if self.calls[behind] < max(self.calls) else None


class ThreadLink:
    """Ranks as threads: the same calls with no process group, for any number of ranks in one process."""

    def __init__(self, room: _Room, rank: int, size: int, device: torch.device | str = "cpu") -> None:
        self.group: dist.ProcessGroup | None = None
        self.rank, self.size, self._room = rank, size, room
        self.device = torch.device(device)

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._room.swap(self.rank, f"all_gather of {_sizes(x)}", x.clone()))

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Wait:
        out = poisoned((sum(receive), *rows.shape[1:]), rows)
        parts = self._room.swap(self.rank, "all_to_all", rows.clone().split(list(send)))
        for room, part in zip(out.split(list(receive)), (p[self.rank] for p in parts), strict=True):
            # As over gloo: a short send leaves the rest of the buffer as it was, without a word.
            room[: part.size(0)] = part[: room.size(0)]
        return lambda: out

    def reduce_scatter(self, x: Tensor) -> Tensor:
        parts = self._room.swap(self.rank, f"reduce_scatter of {_sizes(x)}", x.clone())
        total = parts[0][self.rank].clone()
        for part in parts[1:]:
            total += part[self.rank]
        return total


def _sizes(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"


class Missing(Exception):
    """`rank` did not come to a collective that the others wait in; None where nobody knows which one."""

    def __init__(self, rank: int | None, words: str) -> None:
        super().__init__(words)
        self.rank = rank


def on_threads(size: int, body: Callable[[Link], Any], timeout: float = 60.0, device: torch.device | str = "cpu") -> list[Any]:
    """body(link) on every rank at once. Element r is what rank r returned, or the exception that ended it.

    A rank that ends by an exception releases the others: their next collective raises threading.BrokenBarrierError. So does
    one that not all ranks join within `timeout` seconds; it is a Missing then.
    """
    room = _Room(size, timeout)
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(ThreadLink(room, rank, size, device))
            room.left[rank] = True
        except Exception as error:  # handed to the caller as the rank's result
            results[rank] = error
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank{rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [(r, e) for r, e in enumerate(results) if isinstance(e, Exception)]
    if errors and all(isinstance(e, threading.BrokenBarrierError) for _, e in errors):
        for rank, error in errors:
            results[rank] = Missing(room.missing(), str(error))
    return results


def alone(device: torch.device | str = "cpu") -> Link:
    """The link of a world of one rank."""
    return ThreadLink(_Room(1, 1.0), 0, 1, device)


def check_size(link: Link, ranks: int) -> None:
    check(link.size == ranks, f"the placement is for {ranks} ranks, the group has {link.size}; they must be equal")
