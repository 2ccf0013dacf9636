"""The CUDA stages without a GPU: their sources, compiled by the host's C++ compiler against emulated_cuda.h.

What runs is the real source but for three spellings that only nvcc reads: includes of CUDA, launches, shared memory.
Not covered: a GPU's own arithmetic (its expf), its memory order, and speed.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from moeproof.optimized.cuda import library, scaled_gemm, toolkit
from moeproof.optimized.cuda.candidates import candidates
from moeproof.reference.contract import Candidate, Pair, Problem

Tensor = torch.Tensor
COMPILER = shutil.which("g++")
FLAGS = ("-O1", "-std=c++17", "-shared", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=fast", "-fsanitize=alignment")
HEADER = Path(__file__).with_name("emulated_cuda.h")


def translate(text: str) -> str:
    """CUDA C++ as the host's compiler reads it."""
    text = re.sub(r"#include <cuda_(runtime|bf16|fp16)\.h>\n|#pragma once\n", "", text)
    text = re.sub(
        r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = reinterpret_cast<\1*>(emulated::block->shared.data());", text
    )
    text = text.replace("__shared__ ", "static ").replace("#pragma unroll", "// unroll")
    return re.sub(r"([\w]+(?:<[^<>;]*(?:<\w+>)?[^<>;]*>)?)<<<(.*?)>>>\(", r"emulated::launch(\1, \2)(", text, flags=re.S)


def one_file(path: Path, seen: set[str]) -> str:
    """A source with the headers beside it in place of their includes, each once."""
    if path.name in seen:
        return ""
    seen.add(path.name)
    return re.sub(r'#include "(.*)"', lambda found: one_file(path.parent / found[1], seen), path.read_text())


def build(stage: str, sources: Path, folder: Path) -> Path:
    """Shared library of a stage in `folder`, named by what it is made of."""
    assert COMPILER is not None
    text = translate(one_file(sources / f"{stage}.cu", set()))
    made = folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
    if made.is_file():
        return made
    given = ["-x", "c++", "-include", str(HEADER), "-", "-o", str(made)]
    done = subprocess.run([COMPILER, *FLAGS, *given], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return made


def product(codes_PA: Tensor, scale_P: Tensor, w_eNA: Tensor, scale_eN: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    """scaled_gemm.product in float64: torch's own exists on Hopper only."""
    out = torch.full((codes_PA.size(0), w_eNA.size(1)), torch.nan, dtype=dtype)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        exact = codes_PA[start:end].double() @ w_eNA[expert].double().T
        scaled = exact * scale_P[start:end, None].double() * scale_eN[expert].double()
        out[start:end] = scaled.to(torch.float32).to(dtype)
        start = end
    return out


def unsupported(problem: Problem, real: Callable[[Problem], str | None] = scaled_gemm.unsupported) -> str | None:
    """What scaled_gemm.unsupported says on Hopper."""
    hopper = {"is_available": lambda: True, "get_device_capability": lambda device=None: (9, 0)}
    with patch.multiple(torch.cuda, **hopper):
        return real(problem)


@contextmanager
def emulating(folder: Path, sources: Path = toolkit.SOURCES) -> Iterator[None]:
    """While active, CUDA stages take tensors on the CPU and run here. Libraries are made in `folder`, once."""

    def made(stage: str, arch: str) -> Path:
        return build(stage, sources, folder)

    def call(stage: str, name: str, device: torch.device, **arguments: library.Argument) -> None:
        found = library._function(sources, stage, name, str(folder))
        code = library._run(found, arguments | {"stream": None})
        if code:
            raise library.CudaError(f"{name}: {found.words(code).decode()}")

    with (
        patch.object(toolkit, "build", made),
        patch.object(toolkit, "SOURCES", sources),
        patch.object(library, "_architecture", lambda index: str(folder)),
        patch.object(library, "call", call),
        patch.object(library, "check_tensors", lambda **tensors: None),
        patch.multiple(scaled_gemm, product=product, unsupported=unsupported),
    ):
        yield


def emulated_candidates() -> list[Candidate | Pair]:
    """The CUDA candidates, as ones that run wherever torch runs."""
    return [replace(candidate, backend="torch") for candidate in candidates()]
