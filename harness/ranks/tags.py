"""Payloads that say who they are: every column holds a digit of (rank, token), exact in every format.

Delivery is then proved by who arrived, whatever the order; and a row made of two rows, or with a torn tail, names nobody.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeproof.harness.verdict import Finding
from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.contract.stages import Stage
from moeproof.reference.ranks.dispatch import Pair

Tensor = torch.Tensor
BASE = 128
"""Digits 1 .. 128: integers that bf16, fp16 and fp32 hold exactly."""
DIGITS = 3
SHOWN = 4
"""Findings of one rank that are spelled out."""


def tag(rank: int, tokens: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(tokens, hidden): columns rank + 1, high digit + 1, low digit + 1, and so on in turn."""
    check(hidden >= DIGITS, f"a tag needs {DIGITS} columns, not H={hidden}")
    check(tokens <= BASE * BASE and rank < BASE, f"tags end at {BASE * BASE} tokens on each of {BASE} ranks")
    token = torch.arange(tokens, device=device)
    digits = torch.stack([torch.full_like(token, rank), token // BASE, token % BASE], dim=1) + 1
    return digits[:, torch.arange(hidden, device=device) % DIGITS].to(dtype)


def tagged(ranks: Sequence[Inputs]) -> list[Inputs]:
    """The same call on every rank with tags for hidden states. Where the weight multiplies the input it is 1."""
    out = []
    for rank, inputs in enumerate(ranks):
        x = inputs.hidden_states
        change = {"hidden_states": tag(rank, x.shape[0], x.shape[1], x.dtype, x.device)}
        if inputs.problem.weight_on_input:
            change["topk_weights"] = torch.ones_like(inputs.topk_weights)
        out.append(inputs.map(change))
    return out


def identities(rows: Tensor) -> Tensor:
    """int64 (n, 2): (rank, token) of each row (n, H). (-1, -1) for a row that is nobody's: a column of another row, or no
    digit at all."""
    head = rows[:, :DIGITS]
    whole = (rows == head[:, torch.arange(rows.size(1), device=rows.device) % DIGITS]).all(dim=1)
    digits = head.double() - 1
    somebody = whole & ((digits >= 0) & (digits < BASE) & (digits == digits.floor())).all(dim=1)
    rank, high, low = torch.where(somebody[:, None], digits, 0.0).long().unbind(dim=1)
    return torch.where(somebody[:, None], torch.stack([rank, high * BASE + low], dim=1), -1)


def identify(rows: Tensor) -> list[tuple[int, int] | None]:
    """The same as a list, None for a row that is nobody's."""
    return [None if rank < 0 else (rank, token) for rank, token in identities(rows).tolist()]


def check_identity(rank: int, pairs: Sequence[Pair], rows: Tensor, ids: Tensor) -> list[Finding]:
    """Rows (n, H) with their live ids (n, K), of a tagged call: exactly the (source, token, expert) triples of `pairs`."""
    return check_delivery(rank, triples_of(pairs), rows, ids)


def triples_of(pairs: Sequence[Pair]) -> Tensor:
    """int64 (pairs, 3): source, token, expert."""
    return torch.tensor([(p.source, p.token, p.expert) for p in pairs], dtype=torch.int64).view(-1, 3)


def check_delivery(rank: int, triples: Tensor, rows: Tensor, ids: Tensor) -> list[Finding]:
    """Rows (n, H) with their live ids (n, K), of a tagged call: exactly these (source, token, expert), int64 (m, 3)."""
    return check_names(rank, triples, identities(rows), ids)


def check_names(rank: int, triples: Tensor, names: Tensor, ids: Tensor) -> list[Finding]:
    """The same of rows whose (rank, token) are known: int64 (n, 2), (-1, -1) where a row is nobody's."""
    row, slot = (ids >= 0).nonzero(as_tuple=True)
    got = torch.cat([names[row], ids[row, slot].long()[:, None]], dim=1)
    if bool((nobody := got[:, 0] < 0).any()):
        expert = int(got[nobody][0, 2])
        words = f"a row for expert {expert} carries no rank's token: it is made of pieces, or was never written"
        return [Finding(Stage.DISPATCH, "rows", words, expert=expert, rank=rank)]
    keys, places = torch.cat([triples.to(got.device), got]).unique(dim=0, return_inverse=True)
    need = torch.bincount(places[: len(triples)], minlength=len(keys))
    have = torch.bincount(places[len(triples) :], minlength=len(keys))
    findings = []
    for at in (have != need).nonzero().flatten()[:SHOWN].tolist():
        source, token, expert = keys[at].tolist()
        words = f"token {token} of rank {source} is here {int(have[at])} times for this expert, must be {int(need[at])}"
        findings.append(Finding(Stage.DISPATCH, "rows", words, token=token, expert=expert, rank=rank))
    return findings
