"""What the tests of the memory rules share: running a kernel that must be refused, and a kernel that goes astray on request."""

from __future__ import annotations

from typing import Any

import pytest
import triton
import triton.language as tl

from moeproof.harness import interpreter
from moeproof.harness.interpreter import KernelFault

interpreter.install()


def fault_of(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> KernelFault:
    """Run a kernel that must be refused."""
    with interpreter.sanitized(**options) as log, pytest.raises(KernelFault) as caught:
        kernel[grid](*args)

    assert log.launches[-1].fault is caught.value
    assert str(caught.value) == caught.value.message
    return caught.value


@triton.jit
def shift(x_ptr, out_ptr, n, offset, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    x = tl.load(x_ptr + i + offset, mask=i < n, other=0.0)
    tl.store(out_ptr + i, x, mask=i < n)
