"""Launches that cost the host little: Triton looks a kernel up once, and what it found is launched directly from then on.

Triton binds, specialises and hashes every argument of every launch: with forty of them that takes longer than a small exchange
itself. Here most are the same in every call.
"""

from __future__ import annotations

from typing import Any

import torch

from moeproof.optimized.tiles import interpreted

Tensor = torch.Tensor
ALIGNED = 16
"""Triton compiles a kernel of its own for pointers that begin at a multiple of this."""
WIDEST = 2**31 - 1
"""Whole numbers above it travel as 64 bits."""
Grid = tuple[int, int, int]


class Launcher:
    """A kernel with its first arguments, `fixed`, and its constants, `options`.

    Between them stand those of a call: tensors, then whole numbers, of which the last `free` are those that the kernel's
    decorator says are not specialised.
    """

    def __init__(self, kernel: Any, fixed: tuple[object, ...], free: int = 0, **options: object) -> None:
        self._kernel, self._fixed, self._free, self._options = kernel, fixed, free, options
        self._compiled: dict[tuple[object, ...], Any] = {}
        """By all that Triton specialises on, and whatever else tells the arguments of two calls apart in kind."""
        self._interpreted = interpreted()
        self._addresses = tuple(_address(a) for a in fixed)
        self._constants = tuple(options[name] for name in kernel.arg_names if name in options)
        if not self._interpreted:
            params = kernel.params[len(fixed) : len(kernel.params) - len(self._constants)]
            plain = [p.name for p in params if p.do_not_specialize]
            assert [p.name for p in params[len(params) - free :]] == plain, f"{free} arguments are free, not {plain}"

    def __call__(self, grid: Grid, tensors: tuple[Tensor | None, ...] = (), numbers: tuple[int, ...] = ()) -> None:
        if self._interpreted:
            self._kernel[grid](*self._fixed, *tensors, *numbers, **self._options)
            return
        pointers = tuple([None if t is None else t.data_ptr() for t in tensors])
        free = len(numbers) - self._free
        key = (
            *[None if t is None else (t.dtype, at % ALIGNED, t.is_cuda) for t, at in zip(tensors, pointers, strict=True)],
            *numbers[:free],
            *[n > WIDEST for n in numbers[free:]],
        )
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[grid](*self._fixed, *tensors, *numbers, **self._options)
        else:
            compiled[grid](*self._addresses, *pointers, *numbers, *self._constants)


def _address(argument: object) -> object:
    if isinstance(argument, tuple):
        return tuple(_address(a) for a in argument)
    return argument.data_ptr() if isinstance(argument, Tensor) else argument
