"""The first step of every exchange: do all ranks take part, and do they mean the same call?

A collective that one rank skips, or enters with other sizes, hangs or corrupts. So each rank first shows a record of fixed
size: what it is about to do, or why it will not. Then either all go on, or all raise, each with the reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch

from moeproof.reference.contract.errors import ContractError
from moeproof.reference.contract.link import Link

RECORD = 1024
_GOES, _REFUSES = 0, 1
_HEAD = 33
"""One byte of kind, and the SHA-256 of the text, which the record may cut."""


def agree(link: Link, facts: Mapping[str, object], refusal: str | None) -> None:
    """Collective. Returns on every rank, or raises ContractError on every rank.

    A rank with a `refusal` raises that; the others say which rank refused and why. Where `facts` differ, each rank's message
    names the facts and who has what.
    """
    text = "\n".join(f"{key}={value}" for key, value in facts.items()) if refusal is None else refusal
    records = _exchange(link, _GOES if refusal is None else _REFUSES, text)
    refused = [(rank, words) for rank, (kind, _, words) in enumerate(records) if kind == _REFUSES]
    if refusal is not None:
        raise ContractError(refusal)
    if refused:
        reasons = "; ".join(f"rank {rank} refused: {words}" for rank, words in refused)
        raise ContractError(f"{reasons} (nothing was exchanged)")
    if len({digest for _, digest, _ in records}) > 1:
        raise ContractError(f"the ranks do not agree, nothing was exchanged: {_differences([r[2] for r in records])}")


def withdraw(link: Link, reason: str) -> None:
    """Collective, against the others' `agree`: tell them that this rank cannot go on. Does not raise."""
    _exchange(link, _REFUSES, reason)


def _exchange(link: Link, kind: int, text: str) -> list[tuple[int, bytes, str]]:
    encoded = text.encode()
    head = bytes([kind]) + hashlib.sha256(encoded).digest()
    record = (head + encoded)[:RECORD].ljust(RECORD, b"\0")
    mine = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(link.device)
    seen = [row.numpy().tobytes() for row in link.all_gather(mine).cpu()]
    return [(r[0], r[1:_HEAD], r[_HEAD:].rstrip(b"\0").decode(errors="replace")) for r in seen]


def _differences(texts: list[str]) -> str:
    """`hidden: rank 0 has 64, rank 1 has 32`, for every fact that is not the same everywhere."""
    facts = [dict(line.split("=", 1) for line in text.splitlines() if "=" in line) for text in texts]
    words = []
    for key in dict.fromkeys(key for table in facts for key in table):
        ranks_of: dict[str, list[int]] = {}
        for rank, table in enumerate(facts):
            ranks_of.setdefault(table.get(key, "nothing"), []).append(rank)
        if len(ranks_of) > 1:
            words.append(f"{key}: " + ", ".join(f"rank {_ranks(r)} has {value}" for value, r in ranks_of.items()))
    return "; ".join(words)


def _ranks(ranks: list[int]) -> str:
    return "/".join(map(str, ranks))
