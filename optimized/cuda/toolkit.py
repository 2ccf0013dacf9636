"""Compiling a stage into a shared library, once for each source, flags and architecture, in the user's cache folder.

A plain C library needs no header of torch, so a stage compiles in one to four seconds. Files in the cache are named by the
SHA-256 of what they were made of and put there by an atomic rename: nothing is ever half written, stale or locked.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from moeproof.reference.contract.errors import ContractError, check, known

SOURCES = Path(__file__).parent
STAGES = {
    "router": "ROUTE",
    "align": "PERMUTE",
    "dispatch": "DISPATCH on one rank, and zeros for dead slots",
    "rows": "gather and scatter around a grouped product",
    "activation": "ACT",
    "combine": "COMBINE",
    "quantise": "QUANT1, and ACT with QUANT2",
}
"""Source files, without `.cu`, and what they do. Each becomes one library."""
FLAGS = ("-O3", "-std=c++17", "-lineinfo", "--shared", "-Xcompiler=-fPIC")
CACHE = "MOEPROOF_CUDA_CACHE"
"""Environment variable that names the cache folder."""
NO_TOOLKIT = "no CUDA toolkit was found: install nvcc (CUDA 12 or newer) or set CUDA_HOME to its folder"


def nvcc() -> str | None:
    """Path of the compiler: of CUDA_HOME or CUDA_PATH where set, else the one on PATH, else of /usr/local/cuda."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architecture(device: torch.device) -> str:
    """`sm_80`, `sm_90a`, `sm_100` ..: what nvcc calls this GPU. The `a` opens Hopper's own instructions."""
    major, minor = torch.cuda.get_device_capability(device)
    check(major >= 8, f"CUDA stages need compute capability 8.0 or newer; this GPU has {major}.{minor}")
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def cache_folder() -> Path:
    """$MOEPROOF_CUDA_CACHE, else moeproof/cuda in the user's cache folder."""
    if named := os.environ.get(CACHE):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moeproof" / "cuda"


def key(stage: str, arch: str) -> str:
    """SHA-256 of everything the library is made of."""
    known("CUDA stage", stage, STAGES)
    parts = [" ".join(FLAGS).encode(), arch.encode()]
    for path in (*sorted(SOURCES.glob("*.cuh")), SOURCES / f"{stage}.cu"):
        parts += [path.name.encode(), path.read_bytes()]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()


def library_path(stage: str, arch: str) -> Path:
    """Where the library is or will be."""
    return cache_folder() / f"{stage}-{arch}-{key(stage, arch)[:32]}.so"


def missing(arch: str) -> str | None:
    """Why stages cannot be had for this architecture, or None: they are in the cache, or nvcc can make them."""
    if nvcc() or all(library_path(stage, arch).is_file() for stage in STAGES):
        return None
    return NO_TOOLKIT


def command(compiler: str, stage: str, arch: str, output: Path) -> list[str]:
    generate = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
    return [compiler, *FLAGS, generate, str(SOURCES / f"{stage}.cu"), "-o", str(output)]


def build(stage: str, arch: str) -> Path:
    """The library of a stage, compiled if it is not in the cache. Raises ContractError where that cannot be done."""
    path = library_path(stage, arch)
    if path.is_file():
        return path
    compiler = nvcc()
    if compiler is None:
        raise ContractError(NO_TOOLKIT)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=path.parent)
    except OSError as error:
        raise ContractError(f"cache folder '{path.parent}' cannot be written ({error}); set {CACHE} to another") from error
    with scratch as folder:
        made = Path(folder) / path.name
        done = subprocess.run(command(compiler, stage, arch, made), capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            words = next((line for line in lines if "error" in line or "fatal" in line), lines[0] if lines else "no message")
            raise ContractError(f"{compiler} cannot compile {stage}.cu for {arch}: {words}")
        # Two processes may both get here: either's file will do, and a reader sees a whole one.
        made.replace(path)
    return path
