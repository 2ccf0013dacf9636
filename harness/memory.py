"""Memory discipline: poisoned allocations, guard bands around every buffer, inputs that must not change.

Unwritten memory is often zero in a fresh process, so that a kernel which forgets to write looks right. Here every buffer
that a candidate gets, or makes through torch, is filled with one of three patterns first, and lies between two guard
bands. The three runs must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
GUARD = 512
"""Bytes on each side: keeps the alignment that CUDA's allocator promises."""
PATTERNS = ("nan", "ff", "big")
"""NaN in floats and huge integers; all bits set (-1 in ids); 1e4 in floats and 1 in integers."""

_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default)
_ZERO = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)


def fill(t: Tensor, pattern: str) -> None:
    """Overwrite every byte of the contiguous tensor `t` with the pattern."""
    if pattern == "ff":
        t.view(torch.uint8).fill_(0xFF)
    elif t.is_floating_point() and t.element_size() > 1:
        t.fill_(float("nan") if pattern == "nan" else 1e4)
    elif pattern == "big" and not t.is_floating_point():
        t.fill_(1)  # an id, count or slot number that looks valid: an unwritten one must show as a wrong one
    else:
        t.view(torch.uint8).fill_(0x7F if pattern == "nan" else 0x01)


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger allocation, and the bytes around it that must stay as they are."""

    tensor: Tensor
    name: str
    buffer: Tensor
    """uint8: guard band, the tensor's span up to `end`, guard band."""
    end: int
    bands: Tensor
    """Both bands as they were."""
    content: Tensor | None = None
    """The span as it was, for tensors that must not change."""

    def damage(self) -> str | None:
        """What was written that must not be, in words; None where all is intact."""
        after = self.buffer[self.end :]
        if not torch.equal(self.buffer[:GUARD], self.bands[:GUARD]):
            at = int((self.buffer[:GUARD] != self.bands[:GUARD]).nonzero()[0])
            return f"{GUARD - at} bytes before the start of {self.name} were written"
        if not torch.equal(after, self.bands[GUARD:]):
            at = int((after != self.bands[GUARD:]).nonzero()[0])
            return f"written {at} bytes past the end of {self.name}"
        span = self.buffer[GUARD : self.end]
        if self.content is not None and not torch.equal(span, self.content):
            changed = (span != self.content).nonzero()
            return f"{self.name} was modified at byte {int(changed[0])} ({changed.numel()} bytes differ)"
        return None


def guarded(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, pattern: str, name: str
) -> Guarded:
    """Uninitialised memory of this shape and stride, poisoned, between guard bands."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    size = span * torch.empty(0, dtype=dtype).element_size()
    # A whole number of 16 bytes: the pattern is laid down in the tensor's own dtype, through both bands.
    buffer = torch.empty(-(-size // 16) * 16 + 2 * GUARD, dtype=torch.uint8, device=device)
    fill(buffer.view(dtype), pattern)
    end = GUARD + size
    tensor = buffer[GUARD : buffer.numel() - GUARD].view(dtype).as_strided(shape, stride)
    return Guarded(tensor, name, buffer, end, torch.cat([buffer[:GUARD], buffer[end:]]))


def guard_inputs(inputs: Inputs, pattern: str) -> tuple[Inputs, list[Guarded]]:
    """A copy of all tensors, strides kept, holes of strided views poisoned, each between guard bands."""
    copies: dict[str, Tensor] = {}
    guards: list[Guarded] = []
    for name, t in inputs.tensors():
        guard = guarded(tuple(t.shape), t.stride(), t.dtype, t.device, pattern, name)
        guard.tensor.copy_(t)
        copies[name] = guard.tensor
        guards.append(replace(guard, content=guard.buffer[GUARD : guard.end].clone()))
    return inputs.map(copies), guards


@dataclass
class Poison(TorchDispatchMode):
    """While active, every torch.empty is poisoned and every empty or zeros lies between guard bands."""

    pattern: str
    allocations: list[Guarded] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _EMPTY and func not in _ZERO:
            return result
        if result.layout != torch.strided or result.device.type == "meta" or result.is_quantized:
            return result
        shape = tuple(result.shape)
        name = f"a buffer that the candidate allocated as {shape} {result.dtype}".replace("torch.", "")
        guard = guarded(shape, result.stride(), result.dtype, result.device, self.pattern, name)
        self.allocations.append(guard)
        return guard.tensor.zero_() if func in _ZERO else guard.tensor

    def damage(self) -> list[str]:
        return [words for guard in self.allocations if (words := guard.damage())]
