"""Memory discipline: poisoned allocations, guard bands around every buffer, inputs that must not change.

Unwritten memory is often zero in a fresh process, so that a kernel which forgets to write looks right. Here every buffer
that a candidate gets, or makes through torch, is filled with one of three patterns first, and lies between two guard
bands. The three runs must agree bit for bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moeproof.reference.contract.inputs import Inputs

Tensor = torch.Tensor
GUARD = 512
"""Bytes on each side: keeps the alignment that CUDA's allocator promises."""
BEFORE = 1 << 20
"""At most this many bytes lie before a tensor, for what reads index -1."""
PATTERNS = ("nan", "ff", "big")
"""NaN in floats and huge integers; all bits set (-1 in ids); 1e4 in floats and 1 in integers."""

DIRTY = (1 << 10, 1 << 13, 1 << 16, 1 << 20)
"""Sizes in bytes of the blocks that are filled and freed before a call."""

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
    """uint8: guard band up to `start`, the tensor's span up to `end`, guard band."""
    start: int
    end: int
    bands: Tensor
    """Both bands as they were."""
    content: Tensor | None = None
    """The span as it was, for tensors that must not change."""

    def damage(self) -> str | None:
        """What was written that must not be, in words; None where all is intact."""
        before, after = self.buffer[: self.start], self.buffer[self.end :]
        if not torch.equal(before, self.bands[: self.start]):
            at = int((before != self.bands[: self.start]).nonzero()[0])
            return f"{self.start - at} bytes before the start of {self.name} were written"
        if not torch.equal(after, self.bands[self.start :]):
            at = int((after != self.bands[self.start :]).nonzero()[0])
            return f"written {at} bytes past the end of {self.name}"
        span = self.buffer[self.start : self.end]
        if self.content is not None and not torch.equal(span, self.content):
            changed = (span != self.content).nonzero()
            return f"{self.name} was modified at byte {int(changed[0])} ({changed.numel()} bytes differ)"
        return None


@dataclass(frozen=True)
class Spread:
    """A tensor whose rows lie so far apart that only they are real memory: untouched pages between them, no bands."""

    tensor: Tensor
    name: str
    content: Tensor

    def damage(self) -> str | None:
        same = self.tensor.view(torch.int16) == self.content.view(torch.int16)
        return None if bool(same.all()) else f"{self.name} was modified ({int((~same).sum())} elements differ)"


FAR = 1 << 30
"""Elements from the first to the last beyond which a tensor on the CPU is kept as a Spread."""


def spread(t: Tensor, name: str) -> Spread | None:
    """A copy with the same strides, where these are so large that holes cannot be filled; None for any other tensor."""
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    if t.device.type != "cpu" or span < FAR:
        return None
    copy = torch.empty(span + 1, dtype=t.dtype).as_strided(t.shape, t.stride()).copy_(t)
    return Spread(copy, name, t.clone(memory_format=torch.contiguous_format))


def guarded(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device, pattern: str, name: str
) -> Guarded:
    """Uninitialised memory of this shape and stride, poisoned, between guard bands.

    The band before the start is as long as one index of the first dim, as far as BEFORE allows: a row or expert -1 reads
    the pattern, and not some neighbour's plausible bytes.
    """
    span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if 0 not in shape else 0
    size = span * torch.empty(0, dtype=dtype).element_size()
    first = (stride[0] if stride else 1) * torch.empty(0, dtype=dtype).element_size()
    start = GUARD * max(1, -(-min(first, BEFORE) // GUARD))
    # A whole number of 16 bytes: the pattern is laid down in the tensor's own dtype, through both bands.
    buffer = torch.empty(start + -(-size // 16) * 16 + GUARD, dtype=torch.uint8, device=device)
    fill(buffer.view(dtype), pattern)
    end = start + size
    tensor = buffer[start : buffer.numel() - GUARD].view(dtype).as_strided(shape, stride)
    return Guarded(tensor, name, buffer, start, end, torch.cat([buffer[:start], buffer[end:]]))


def guard_inputs(inputs: Inputs, pattern: str, device: str | None = None) -> tuple[Inputs, list[Guarded | Spread]]:
    """A copy of all tensors, strides kept, holes of strided views poisoned, each between guard bands; on `device` if given."""
    where = inputs.device if device is None else torch.device(device)
    copies: dict[str, Tensor] = {}
    guards: list[Guarded | Spread] = []
    for name, t in inputs.tensors():
        if where.type == "cpu" and (far := spread(t, name)):
            copies[name] = far.tensor
            guards.append(far)
            continue
        guard = guarded(tuple(t.shape), t.stride(), t.dtype, where, pattern, name)
        guard.tensor.copy_(t)
        copies[name] = guard.tensor
        guards.append(replace(guard, content=guard.buffer[guard.start : guard.end].clone()))
    return inputs.map(copies), guards


def dirty(device: torch.device) -> None:
    """Leave garbage in the allocator's free lists: what a kernel allocates past torch.empty is not clean either."""
    for size in DIRTY:
        torch.full((size,), 0xFF, dtype=torch.uint8, device=device)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether the byte spans of two tensors meet. Interleaved views of one buffer count: their spans do."""
    if a.device != b.device or a.layout != torch.strided or b.layout != torch.strided or not a.numel() or not b.numel():
        return False
    (a0, a1), (b0, b1) = _span(a), _span(b)
    return a0 < b1 and b0 < a1


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


@dataclass
class Poison(TorchDispatchMode):
    """While active, every torch.empty is poisoned and every empty or zeros lies between guard bands."""

    pattern: str
    allocations: list[Guarded] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: torch would import its compiler (2 s) on the first call, to keep it out; see __torch_dispatch__."""
        return False

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "torch._dynamo" in sys.modules:  # a candidate compiles: it must not look in here
            return _outside_dynamo(self, func, args, kwargs)
        return self.poisoned(func, args, kwargs)

    def poisoned(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The operation's own result, or poisoned memory in its place."""
        result = func(*args, **(kwargs or {}))
        if func not in _EMPTY and func not in _ZERO:
            return result
        if result.layout != torch.strided or result.device.type == "meta" or result.is_quantized:
            return result
        if (kwargs or {}).get("pin_memory"):  # host memory that a device reaches: ours would be out of its reach
            return result
        shape = tuple(result.shape)
        name = f"a buffer that the candidate allocated as {shape} {result.dtype}".replace("torch.", "")
        guard = guarded(shape, result.stride(), result.dtype, result.device, self.pattern, name)
        self.allocations.append(guard)
        return guard.tensor.zero_() if func in _ZERO else guard.tensor

    def damage(self) -> list[str]:
        return [words for guard in self.allocations if (words := guard.damage())]


_outside_dynamo = torch._disable_dynamo(Poison.poisoned)
