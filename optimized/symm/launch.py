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
Grid = tuple[int, int, int]


class Launcher:
    """A kernel with its first arguments, `fixed`, and its constants, `options`; between them stand those of a call."""

    def __init__(self, kernel: Any, fixed: tuple[object, ...], **options: object) -> None:
        self._kernel, self._fixed, self._options = kernel, fixed, options
        self._compiled: dict[tuple[object, ...], Any] = {}
        """By what Triton specialises on, and by whatever else tells the arguments of two calls apart in kind."""
        self._interpreted = interpreted()
        self._addresses = tuple(_address(a) for a in fixed)
        self._constants = tuple(options[name] for name in kernel.arg_names if name in options)
        self._specialised: tuple[bool, ...] = ()
        if not self._interpreted:
            params = kernel.params[len(fixed) : len(kernel.params) - len(self._constants)]
            self._specialised = tuple(not p.do_not_specialize for p in params)

    def __call__(self, grid: Grid, *arguments: Any) -> None:
        if self._interpreted:
            self._kernel[grid](*self._fixed, *arguments, **self._options)
            return
        looks: list[object] = []
        values: list[object] = []
        for argument, specialised in zip(arguments, self._specialised, strict=True):
            kind = type(argument)
            if isinstance(argument, Tensor):
                at = argument.data_ptr()
                looks += (argument.dtype, at % ALIGNED, argument.is_cuda)
                values.append(at)
            else:
                looks.append(argument if specialised or kind is not int else argument.bit_length() > 31)
                values.append(argument)
        key = tuple(looks)
        compiled = self._compiled.get(key)
        if compiled is None:
            self._compiled[key] = self._kernel[grid](*self._fixed, *arguments, **self._options)
        else:
            compiled[grid](*self._addresses, *values, *self._constants)


def _address(argument: object) -> object:
    if isinstance(argument, tuple):
        return tuple(_address(a) for a in argument)
    return argument.data_ptr() if isinstance(argument, Tensor) else argument
