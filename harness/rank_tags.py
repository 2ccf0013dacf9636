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


def identify(rows: Tensor) -> list[tuple[int, int] | None]:
    """(rank, token) of each row (n, H), None for a row that is nobody's: a column of another row, or no digit at all."""
    names: list[tuple[int, int] | None] = []
    for row in rows.double().cpu().tolist():
        rank, high, low = (row[digit] - 1 for digit in range(DIGITS))
        whole = all(value == row[column % DIGITS] for column, value in enumerate(row))
        digits = all(float(d).is_integer() and 0 <= d < BASE for d in (rank, high, low))
        names.append((int(rank), int(high) * BASE + int(low)) if whole and digits else None)
    return names


def check_identity(rank: int, pairs: Sequence[Pair], rows: Tensor, ids: Tensor) -> list[Finding]:
    """Rows (n, H) with their live ids (n, K), of a tagged call: exactly the (source, token, expert) triples of `pairs`."""
    got: dict[tuple[int, int, int], int] = {}
    for name, row in zip(identify(rows), ids.tolist(), strict=True):
        for expert in (e for e in row if e >= 0):
            if name is None:
                words = f"a row for expert {expert} carries no rank's token: it is made of pieces, or was never written"
                return [Finding(Stage.DISPATCH, "rows", words, expert=expert, rank=rank)]
            got[(*name, expert)] = got.get((*name, expert), 0) + 1
    want: dict[tuple[int, int, int], int] = {}
    for pair in pairs:
        key = (pair.source, pair.token, pair.expert)
        want[key] = want.get(key, 0) + 1
    findings = []
    for key in sorted(got.keys() | want.keys()):
        have, need = got.get(key, 0), want.get(key, 0)
        if have != need:
            source, token, expert = key
            words = f"token {token} of rank {source} is here {have} times for this expert, must be {need}"
            findings.append(Finding(Stage.DISPATCH, "rows", words, token=token, expert=expert, rank=rank))
    return findings[:4]
