"""What the tests run on ranks. Every function takes the RankContext first; ranks import this module by name."""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from moeproof.harness.ranks import RankContext, announce


def total(context: RankContext, value: float) -> float:
    """The sum over all ranks of value + rank."""
    context.enter("COMBINE")
    t = torch.full((4,), value + context.rank)
    dist.all_reduce(t)
    return float(t[0])


def exchange(context: RankContext, rows: int, width: int) -> list[float]:
    """An all-to-all there and back: each rank gets its own rows again."""
    splits = [rows] * context.world_size
    mine = torch.full((rows * context.world_size, width), float(context.rank))
    there, back = torch.empty_like(mine), torch.empty_like(mine)
    dist.all_to_all_single(there, mine, splits, splits)
    dist.all_to_all_single(back, there, splits, splits)
    assert torch.equal(back, mine)
    return [float(x) for x in there[:: max(rows, 1), 0]]


def seeds(context: RankContext) -> tuple[int, float]:
    return context.seed, float(torch.rand(1))


def threads(context: RankContext) -> tuple[int, int]:
    return torch.get_num_threads(), os.getpgid(0)


def skips(context: RankContext, skipper: int) -> None:
    """One rank leaves the second all_reduce out, and returns."""
    t = torch.ones(4)
    context.enter("DISPATCH")
    dist.all_reduce(t)
    context.enter("COMBINE")
    if context.rank != skipper:
        dist.all_reduce(t)


def stalls(context: RankContext, staller: int) -> None:
    """One rank never comes to the collective that the others wait in."""
    context.enter("DISPATCH")
    dist.all_reduce(torch.ones(4, device=context.device))
    context.enter("GEMM1")
    if context.rank == staller:
        time.sleep(3600)
    dist.all_reduce(torch.ones(4, device=context.device))


def spins(context: RankContext, spinner: int) -> None:
    """One rank computes for ever without giving the interpreter up."""
    if context.rank == spinner:
        sum(range(10**15))
    dist.barrier()


def wrong_order(context: RankContext) -> None:
    t = torch.ones(4)
    if context.rank == 0:
        dist.all_reduce(t)
        dist.broadcast(t, 0)
    else:
        dist.broadcast(t, 0)
        dist.all_reduce(t)


def other_sizes(context: RankContext) -> None:
    dist.all_reduce(torch.ones(4 + context.rank))


def other_dtype(context: RankContext) -> None:
    dist.all_reduce(torch.ones(4, dtype=torch.float32 if context.rank else torch.float64))


def sends_less(context: RankContext, missing: int) -> list[float]:
    """Rank 0 sends fewer rows than rank 1 expects. gloo says nothing."""
    n = context.world_size
    send = [2] * n
    if context.rank == 0:
        send[1] -= missing
    mine = torch.ones(sum(send), 3)
    out = torch.full((2 * n, 3), float("nan"))
    dist.all_to_all_single(out, mine, [2] * n, send)
    return out[:, 0].tolist()


def broadcast_alone(context: RankContext) -> None:
    """The root calls a broadcast that nobody takes part in. gloo lets it return."""
    if context.rank == 0:
        dist.broadcast(torch.ones(4), 0)


def reduces_otherwise(context: RankContext) -> None:
    dist.all_reduce(torch.ones(4), op=dist.ReduceOp.SUM if context.rank else dist.ReduceOp.MAX)


def raises(context: RankContext, raiser: int) -> None:
    context.enter("PERMUTE")
    if context.rank == raiser:
        raise IndexError("expert 9 of 8")
    dist.all_reduce(torch.ones(4, device=context.device))


def all_raise(context: RankContext) -> None:
    raise ValueError(f"no such scheme on rank {context.rank}")


def dies(context: RankContext, victim: int, how: str) -> None:
    """One rank ends in the middle of an exchange."""
    context.enter("DISPATCH")
    dist.all_reduce(torch.ones(4, device=context.device))
    if context.rank == victim:
        with announce("put", torch.ones(2, 3)):
            if how == "exit":
                os._exit(3)
            os.kill(os.getpid(), getattr(signal, how))
    dist.all_reduce(torch.ones(4, device=context.device))


def subgroups(context: RankContext) -> float:
    """Two groups of two; a collective in each, and a send from one to the other."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    t = torch.ones(context.rank // 2 + 1)
    dist.all_reduce(t, group=groups[context.rank // 2])
    if context.rank == 0:
        dist.send(t, 2)
    if context.rank == 2:
        dist.recv(torch.empty(1), 0)
    return float(t.sum())


def everything(context: RankContext) -> list[str]:
    """Collectives of many kinds, uneven where they may be; the names that were called."""
    r, n = context.rank, context.world_size
    x = torch.ones(n, 2)
    dist.barrier()
    dist.all_gather_into_tensor(torch.empty(n * n, 2), x)
    dist.all_gather([torch.empty(n, 2) for _ in range(n)], x)
    dist.reduce_scatter_tensor(torch.empty(1, 2), x)
    dist.broadcast(x, 1)
    dist.reduce(x, 0)
    dist.gather(x, [torch.empty_like(x) for _ in range(n)] if r == 0 else None, 0)
    dist.scatter(x, [torch.empty_like(x) for _ in range(n)] if r == 1 else None, 1)
    objects = [None] * n
    dist.all_gather_object(objects, "r" * r)
    send = [r] * n
    dist.all_to_all_single(torch.empty(sum(range(n)), 2), torch.ones(r * n, 2), list(range(n)), send)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    if r == 0:
        dist.batch_isend_irecv([dist.P2POp(dist.isend, x, 1)])[0].wait()
    if r == 1:
        dist.batch_isend_irecv([dist.P2POp(dist.irecv, torch.empty_like(x), 0)])[0].wait()
    return [str(o) for o in objects]


def leaves_a_child(context: RankContext, path: str) -> None:
    """Start a process of its own, write its pid down, and hang."""
    import subprocess
    import sys
    from pathlib import Path

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    Path(path, f"rank{context.rank}").write_text(f"{os.getpid()} {child.pid}")
    if context.rank == 0:
        sum(range(10**15))
    dist.barrier()


def returns(context: RankContext, x: torch.Tensor) -> torch.Tensor:
    return x + context.rank


def functional_sum(context: RankContext) -> float:
    import torch.distributed._functional_collectives as functional

    return float(functional.all_reduce(torch.ones(2), "sum", dist.group.WORLD).sum())


def refuses(context: RankContext, refuser: int) -> None:
    """One rank refuses its arguments and tells the others, who raise what they were told."""
    from moeproof.reference.contract.errors import ContractError

    reasons: list[str | None] = [None] * context.world_size
    words = "5 tokens on this rank, at most 4 are allowed"
    dist.all_gather_object(reasons, words if context.rank == refuser else "")
    if context.rank == refuser:
        time.sleep(0.05)
        raise ContractError(words)
    raise ContractError("; ".join(f"rank {r} refused: {words}" for r, words in enumerate(reasons) if words))


def stops(context: RankContext, victim: int) -> None:
    if context.rank == victim:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.barrier()


def one_reduces_otherwise(context: RankContext, other: int) -> None:
    dist.all_reduce(torch.ones(4), op=dist.ReduceOp.MIN if context.rank == other else dist.ReduceOp.SUM)


def exchange_on_device(context: RankContext, rows: int) -> bool:
    """An uneven all-to-all there and back, where this transport's tensors lie."""
    n = context.world_size
    send = [rows + r for r in range(n)]
    receive = [rows + context.rank] * n
    mine = torch.full((sum(send), 8), float(context.rank), device=context.device)
    there, back = mine.new_empty(sum(receive), 8), torch.empty_like(mine)
    dist.all_to_all_single(there, mine, receive, send)
    dist.all_to_all_single(back, there, send, receive)
    return bool(torch.equal(back, mine))


def symmetric_put(context: RankContext) -> float:
    """Each rank writes its number into the next one's symmetric memory; what arrived here."""
    import torch.distributed._symmetric_memory as symmetric

    context.enter("DISPATCH")
    buffer = symmetric.empty(64, dtype=torch.float32, device=context.device)
    handle = symmetric.rendezvous(buffer, context.group.group_name)
    buffer.fill_(-1)
    handle.barrier()
    peer = (context.rank + 1) % context.world_size
    with announce("put", buffer):
        handle.get_buffer(peer, (64,), torch.float32).fill_(float(context.rank))
    handle.barrier()
    return float(buffer[0])


def spins_on_device(context: RankContext, spinner: int) -> None:
    """One rank's GPU is busy for about a minute, and the others wait for it."""
    if context.rank == spinner:
        torch.cuda._sleep(100_000_000_000)
    x = torch.ones(4, device=context.device)
    dist.all_reduce(x)
    x.cpu()


def illegal_address(context: RankContext, victim: int) -> None:
    """One rank loses its CUDA context."""
    if context.rank == victim:
        x = torch.zeros(4, device=context.device)
        x[torch.tensor([1 << 40], device=context.device)]
        torch.cuda.synchronize()
    dist.all_reduce(torch.ones(4, device=context.device))
