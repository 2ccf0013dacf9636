"""Calling the C functions of a stage's library, by argument name: the signature in the .cu file is the only one.

    call("combine", "moeproof_combine", device, y=y, T=16, ...)

Tensors become pointers, dtypes become codes, None a null pointer; the stream is the current one of `device`.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from moeproof.optimized.cuda import toolkit
from moeproof.reference.contract.errors import ContractError, check

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Codes of stage.cuh."""
Argument = torch.Tensor | torch.dtype | int | float | None

_TYPES: dict[str, type] = {
    "long long": ctypes.c_longlong,
    "unsigned": ctypes.c_uint,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "cudaStream_t": ctypes.c_void_p,
}


class CudaError(RuntimeError):
    """A launch failed: the message is CUDA's own. A sticky error of an earlier kernel can surface here."""


def signatures(sources: Path, stage: str) -> dict[str, dict[str, type]]:
    """{function: {parameter: C type}} of every `extern "C" int` in a stage's source."""
    macro = re.search(r"#define SLOT_PARAMETERS((?:.*\\\n)*.*)", (sources / "slots.cuh").read_text(encoding="utf-8"))
    assert macro is not None
    text = (sources / f"{stage}.cu").read_text(encoding="utf-8").replace("SLOT_PARAMETERS", macro[1].replace("\\\n", " "))
    return {
        name: dict(_parameter(declaration) for declaration in parameters.split(","))
        for name, parameters in re.findall(r'extern "C" int (\w+)\(([^)]*)\)', text)
    }


def _parameter(declaration: str) -> tuple[str, type]:
    kind, name = re.fullmatch(r"\s*(?:const )?(.*?)\s*(\w+)\s*", declaration, re.S).groups()  # type: ignore[union-attr]
    return name, ctypes.c_void_p if "*" in kind else _TYPES[kind]


@functools.cache
def _load(sources: Path, stage: str, arch: str) -> ctypes.CDLL:
    path = toolkit.build(stage, arch)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise ContractError(f"'{path}' cannot be loaded ({error}); delete it, and it will be compiled again") from error


@dataclass(frozen=True)
class _Function:
    run: Callable[..., int]
    parameters: tuple[str, ...]
    words: Callable[[int], bytes]
    """What an error code means."""


@functools.cache
def _function(sources: Path, stage: str, name: str, arch: str) -> _Function:
    loaded = _load(sources, stage, arch)
    parameters = signatures(sources, stage)[name]
    run, words = getattr(loaded, name), loaded.moeproof_error
    run.argtypes, run.restype = list(parameters.values()), ctypes.c_int
    words.argtypes, words.restype = [ctypes.c_int], ctypes.c_char_p
    return _Function(run, tuple(parameters), words)


@functools.cache
def _architecture(index: int) -> str:
    return toolkit.architecture(torch.device("cuda", index))


def _raw(value: Argument) -> int | float | None:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return DTYPES[value] if isinstance(value, torch.dtype) else value


def query(stage: str, name: str, device: torch.device, **arguments: Argument) -> int:
    """What a function that launches nothing returns."""
    found = _function(toolkit.SOURCES, stage, name, _architecture(device.index or 0))
    return _run(found, arguments)


def call(stage: str, name: str, device: torch.device, **arguments: Argument) -> None:
    """Launch. `arguments` are all of the function's parameters but the stream. Raises CudaError where CUDA refuses."""
    with torch.cuda.device(device):
        found = _function(toolkit.SOURCES, stage, name, _architecture(torch.cuda.current_device()))
        code = _run(found, arguments | {"stream": torch.cuda.current_stream().cuda_stream})
    if code:
        raise CudaError(f"{name}: {found.words(code).decode()} (CUDA error {code})")


def _run(function: _Function, given: dict[str, Argument]) -> int:
    assert given.keys() == set(function.parameters), f"{sorted(given.keys() ^ set(function.parameters))}: missing or unknown"
    return function.run(*[_raw(given[parameter]) for parameter in function.parameters])


def check_tensors(**tensors: torch.Tensor | None) -> None:
    """All on one CUDA device. For the tensors whose addresses go to a kernel."""
    first: torch.Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check(tensor.is_cuda, f"{name} is on {tensor.device}; CUDA stages take tensors on a CUDA device")
        first = tensor if first is None else first
        check(
            tensor.device == first.device, f"{name} is on {tensor.device}, another tensor on {first.device}; all must share one"
        )


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    check(tensor.dtype in DTYPES, f"{name} is {tensor.dtype}, must be one of {', '.join(map(str, DTYPES))}")
