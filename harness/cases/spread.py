"""Spread recipes: how many of the tokens each rank holds."""

from __future__ import annotations

from moeproof.harness.cases.generator import Stream

SPREADS = {
    "even": "the first T mod n ranks hold one token more",
    "uneven": "cut at points drawn from the seed, never all equal where T >= 1; some may be empty",
    "empty": "every second rank holds no token",
    "one": "the last rank holds all tokens",
}


def spread_tokens(tokens: int, ranks: int, spread: str, seed: int) -> tuple[int, ...]:
    """Tokens of each rank; they add up to `tokens`."""
    if spread == "one":
        return (0,) * (ranks - 1) + (tokens,)
    if spread == "empty":
        filled = _even(tokens, (ranks + 1) // 2)
        return tuple(filled[rank // 2] if rank % 2 == 0 else 0 for rank in range(ranks))
    if spread == "even" or ranks == 1:
        return _even(tokens, ranks)
    cuts = sorted(Stream(seed, "spread").integers(0, tokens + 1, ranks - 1).tolist())
    shares = [after - before for before, after in zip([0, *cuts], [*cuts, tokens], strict=True)]
    if tokens and len(set(shares)) == 1:
        shares[0], shares[-1] = shares[0] + 1, shares[-1] - 1
    return tuple(shares)


def _even(tokens: int, ranks: int) -> tuple[int, ...]:
    base, extra = divmod(tokens, ranks)
    return tuple(base + (rank < extra) for rank in range(ranks))
