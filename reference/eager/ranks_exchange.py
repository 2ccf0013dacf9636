"""A checked all-to-all: splits compared before, seals looked at after. gloo itself is silent about both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.link import Link
from moeproof.reference.eager.ranks_message import fields_of, pack, unpack

Tensor = torch.Tensor


def exchange_counts(link: Link, counts: Tensor) -> Tensor:
    """int64 (R, n): every rank's counts (n,), on the CPU."""
    return link.all_gather(counts.to(link.device, torch.int64)).cpu()


def check_splits(link: Link, send: Sequence[int], receive: Sequence[int]) -> None:
    """Collective: raise on every rank unless what each sends is what the other expects, naming the pairs that differ."""
    both = exchange_counts(link, torch.tensor([list(send), list(receive)]).flatten()).view(link.size, 2, link.size)
    sent, expected = both[:, 0], both[:, 1].T
    wrong = (sent != expected).nonzero().tolist()
    if wrong:
        pairs = ", ".join(f"rank {a} sends {sent[a, b]} rows to rank {b}, which expects {expected[a, b]}" for a, b in wrong[:4])
        raise ContractError(f"the ranks do not agree on splits, nothing was exchanged: {pairs}; {len(wrong)} pairs differ")


def start_exchange(
    link: Link, columns: Sequence[Tensor], send: Sequence[int], receive: Sequence[int]
) -> Callable[[], list[Tensor]]:
    """Start sending rows of all `columns` (n, ..), send[r] of them to rank r. The returned function waits for those received,
    in rank order, and raises ContractError (on this rank) where a row is not exactly what some rank packed."""
    fields = fields_of(columns)
    wait = link.all_to_all(pack(columns), send, receive)

    def finish() -> list[Tensor]:
        arrived, sealed = unpack(wait(), fields)
        if not bool(sealed.all()):
            source = torch.repeat_interleave(torch.arange(link.size), torch.tensor(list(receive)))
            bad = ~sealed.cpu()
            ranks = sorted(set(source[bad].tolist()))
            raise ContractError(
                f"rank {link.rank}: {int(bad.sum())} of {bad.numel()} rows that ranks {ranks} declared did not arrive as sent"
            )
        return arrived

    return finish
