"""Counter-based random numbers from integer arithmetic alone: the same bytes on every OS, device and torch version.

Word i of stream (seed, name) is the SplitMix64 output function (Steele, Lea, Flood 2014) of key + (i + 1) * golden ratio,
in wrapping 64-bit arithmetic. torch's int64 kernels wrap alike on CPU and GPU, so full-size weights are made on the GPU in
milliseconds with the bytes a laptop makes. Values come from the words by exact operations and one float64 division.
"""

from __future__ import annotations

import hashlib

import torch

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def _signed(word: int) -> int:
    """The int64 that has the bits of this unsigned 64-bit word."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


def _shift(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical right shift: torch's >> on int64 copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Stream:
    """Words of one named stream. Two streams of a seed are independent; order of creation does not matter."""

    def __init__(self, seed: int, name: str, device: torch.device | str = "cpu") -> None:
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        self.key = int.from_bytes(digest[:8], "little")
        self.device = torch.device(device)
        self.used = 0

    def words(self, count: int) -> torch.Tensor:
        """The next `count` 64-bit words, as int64 (count,)."""
        index = torch.arange(self.used + 1, self.used + count + 1, dtype=torch.int64, device=self.device)
        self.used += count
        x = index.mul_(_signed(_GOLDEN)).add_(_signed(self.key))
        x = (x ^ _shift(x, 30)).mul_(_signed(_MIX1))
        x = (x ^ _shift(x, 27)).mul_(_signed(_MIX2))
        return x ^ _shift(x, 31)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        """int64 in [low, high), from the top 32 bits by multiplication (bias below 2^-32 * range)."""
        words = _shift(self.words(_numel(shape)), 32)
        return (low + ((words * (high - low)) >> 32)).view(shape)

    def uniform(self, *shape: int) -> torch.Tensor:
        """float64 in [0, 1): 53 bits, exact."""
        return (_shift(self.words(_numel(shape)), 11).double() * 2.0**-53).view(shape)

    def normal(self, *shape: int) -> torch.Tensor:
        """float64, mean 0, variance 1, near-normal: the centred sum of a word's four 16-bit quarters (|x| < 3.47)."""
        words = self.words(_numel(shape))
        total = words & 0xFFFF
        for quarter in (16, 32, 48):
            total = total + (_shift(words, quarter) & 0xFFFF)
        # Four uniform integers on [0, 65535]: mean 131070, variance 4 * (2^32 - 1) / 12.
        return ((total - 131070).double() / 37837.22680272).view(shape)

    def shuffled(self, *shape: int) -> torch.Tensor:
        """int64: an independent random permutation of 0..n-1 along the last dim."""
        return torch.argsort(_shift(self.words(_numel(shape)), 1).view(shape), dim=-1, stable=True)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
