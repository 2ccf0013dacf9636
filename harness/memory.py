"""Memory discipline: poisoned allocations, guard bands around every buffer, inputs that must not change.

Unwritten memory is often zero in a fresh process, so that a kernel which forgets to write looks right. Here every buffer
that a candidate gets, or makes through torch, is filled with one of three patterns first, and lies between two guard
bands. The three runs must agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
GUARD = 512
"""Bytes on each side: keeps the alignment that CUDA's allocator promises."""
PATTERNS = ("nan", "ff", "big")
"""NaN in floats and huge integers; all bits set (-1 in ids); 1e4 in floats and small positive integers."""

_aten = torch.ops.aten
_EMPTY = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default)
_ZERO = (_aten.zeros.default, _aten.zeros_like.default, _aten.new_zeros.default)


def fill(t: Tensor, pattern: str) -> None:
    """Overwrite every byte of the contiguous tensor `t` with the pattern."""
    if pattern == "ff":
        t.view(torch.uint8).fill_(0xFF)
    elif t.is_floating_point() and t.element_size() > 1:
        t.fill_(float("nan") if pattern == "nan" else 1e4)
    else:
        t.view(torch.uint8).fill_(0x7F if pattern == "nan" else 0x01)


@dataclass(frozen=True)
class Guarded:
    """A tensor inside a larger allocation, and the bytes that must stay as they are."""

    tensor: Tensor
    buffer: Tensor
    """uint8: guard, the tensor's span, guard."""
    before: Tensor
    """The guards as they were (the whole buffer for inputs)."""
    name: str
    whole: bool

    def damage(self) -> str | None:
        """What was written that must not be, in words; None where all is intact."""
        now = self.buffer if self.whole else torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]])
        changed = (now != self.before).nonzero()
        if not changed.numel():
            return None
        at = int(changed[0])
        end = self.buffer.numel() - GUARD
        if not self.whole and at >= GUARD:
            at += end - GUARD
        if at < GUARD:
            return f"{GUARD - at} bytes before the start of {self.name} were written"
        if at >= end:
            return f"written {at - end} bytes past the end of {self.name}"
        return f"{self.name} was modified at byte {at - GUARD} ({changed.numel()} bytes differ)"


def guarded(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, pattern: str
) -> tuple[Tensor, Tensor]:
    """(tensor, buffer): uninitialised memory of this shape and stride, poisoned, between guard bands."""
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    itemsize = torch.empty(0, dtype=dtype).element_size()
    # Round up so that both guards stay aligned for every dtype.
    size = -(-span * itemsize // 16) * 16
    buffer = torch.empty(size + 2 * GUARD, dtype=torch.uint8, device=device)
    fill(buffer.view(dtype), pattern)
    inner = buffer[GUARD : GUARD + size].view(dtype)
    return inner.as_strided(shape, stride), buffer


def guard_inputs(inputs: Inputs, pattern: str) -> tuple[Inputs, list[Guarded]]:
    """A copy of all tensors, strides kept, holes of strided views poisoned, each between guard bands."""
    copies: dict[str, Tensor] = {}
    guards: list[Guarded] = []
    for name, t in inputs.tensors():
        tensor, buffer = guarded(tuple(t.shape), t.stride(), t.dtype, t.device, pattern)
        tensor.copy_(t)
        copies[name] = tensor
        guards.append(Guarded(tensor, buffer, buffer.clone(), name, whole=True))
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
        shape, stride = tuple(result.shape), result.stride()
        tensor, buffer = guarded(shape, stride, result.dtype, result.device, self.pattern)
        name = f"a buffer that the candidate allocated as {shape} {result.dtype}".replace("torch.", "")
        bands = torch.cat([buffer[:GUARD], buffer[-GUARD:]])
        self.allocations.append(Guarded(tensor, buffer, bands, name, whole=False))
        return tensor.zero_() if func in _ZERO else tensor

    def damage(self) -> list[str]:
        return [words for guard in self.allocations if (words := guard.damage())]
