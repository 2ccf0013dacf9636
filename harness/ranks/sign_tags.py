"""Payloads that say who they are in any number format: the signs of a row spell (rank, token), and its amax a further hint.

Every value of a row has one magnitude, a power of two, so every format keeps each sign whatever its scales. Neighbouring
tokens have other magnitudes, and with them other scales: what a row decodes to is some token only with its own scale.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moeproof.reference.contract.errors import check
from moeproof.reference.contract.inputs import Inputs
from moeproof.reference.oracle.quantise import Quantised

Tensor = torch.Tensor
MAGNITUDES = 5
"""Powers of two in turn: 1/4 to 4, inside the reach of every static scale."""


def width(ranks: Sequence[Inputs]) -> int:
    """Bits of a name: of the rank, of the token, and a first one that is always set."""
    most = max((inputs.problem.T for inputs in ranks), default=0)
    return 1 + _bits(len(ranks)) + _bits(most)


def sign_tagged(ranks: Sequence[Inputs]) -> list[Inputs]:
    """The same call on every rank with such rows for hidden states. Where the weight multiplies the input it is 1."""
    bits, token_bits = width(ranks), _bits(max((inputs.problem.T for inputs in ranks), default=0))
    out = []
    for rank, inputs in enumerate(ranks):
        x = inputs.hidden_states
        check(x.shape[1] >= bits, f"a tag of {bits} signs needs as many columns, not H={x.shape[1]}")
        token = torch.arange(x.shape[0], device=x.device)
        name = (1 << (bits - 1)) | (rank << token_bits) | token
        place = torch.arange(x.shape[1], device=x.device) % bits
        signs = 1.0 - 2.0 * ((name[:, None] >> place[None]) & 1).double()
        change = {"hidden_states": (signs * magnitude(rank, token)[:, None]).to(x.dtype)}
        if inputs.problem.weight_on_input:
            change["topk_weights"] = torch.ones_like(inputs.topk_weights)
        out.append(inputs.map(change))
    return out


def magnitude(rank: int | Tensor, token: Tensor) -> Tensor:
    """float64: the only magnitude in the row of each token."""
    return 2.0 ** ((token + 2 * rank) % MAGNITUDES - MAGNITUDES // 2).double()


def sign_identities(operand: Quantised, ranks: Sequence[Inputs]) -> Tensor:
    """int64 (n, 2): (rank, token) of each received row (n, H), (-1, -1) where it is nobody's: made of pieces, or scaled as
    another token is. Where codes stand for a value with an error, magnitudes are told apart by their binade."""
    bits, token_bits = width(ranks), _bits(max((inputs.problem.T for inputs in ranks), default=0))
    negative, values = operand.q < 0, operand.values.abs()
    place = torch.arange(negative.shape[1], device=negative.device) % bits
    whole = (negative == negative[:, :bits][:, place]).all(dim=1)
    name = (negative[:, :bits].long() << torch.arange(bits, device=negative.device)).sum(dim=1)
    rank, token = (name >> token_bits) & ((1 << _bits(len(ranks))) - 1), name & ((1 << token_bits) - 1)
    ratio = values / magnitude(rank, token)[:, None]
    own = ((ratio > 2**-0.5) & (ratio < 2**0.5)).all(dim=1) & (name >> (bits - 1) == 1)
    return torch.where((whole & own)[:, None], torch.stack([rank, token], dim=1), -1)


def _bits(count: int) -> int:
    return max(count - 1, 1).bit_length()
