"""Compiling a stage into a shared library, once for each source, flags and architecture, in the user's cache folder.

A plain C library needs no header of torch, so a stage compiles in one to fifteen seconds. Libraries are named by the SHA-256 of
what they were made of and put in place by an atomic rename: nothing is ever half written, stale or locked. Libraries made ahead
of time (build.py) lie in the package itself, and are found first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from moeproof.reference.contract.errors import ContractError, check, known

SOURCES = Path(__file__).parent
PREBUILT = "prebuilt"
"""Folder beside the sources for libraries that a wheel takes along."""
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
NO_TOOLKIT = "no CUDA toolkit was found: install nvcc (CUDA 12 or newer, or moeproof[cuda]) or set CUDA_HOME to its folder"


def nvcc() -> str | None:
    """Path of the compiler: of CUDA_HOME or CUDA_PATH where set, else on PATH, in /usr/local/cuda, in NVIDIA's wheels."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    for home in homes:
        if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return found
    for path in (None, "/usr/local/cuda/bin", os.pathsep.join(_wheels())):
        if found := shutil.which("nvcc", path=path):
            return found
    return None


def _wheels() -> list[str]:
    """Folders of programs of the wheels nvidia-cuda-nvcc and its like, newest CUDA first."""
    spec = importlib.util.find_spec("nvidia")
    places = spec.submodule_search_locations if spec is not None else None
    return [str(folder) for place in places or () for folder in sorted(Path(place).glob("cu*/bin"), reverse=True)]


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


def library_name(stage: str, arch: str) -> str:
    return f"{stage}-{arch}-{key(stage, arch)[:32]}.so"


def find(stage: str, arch: str) -> Path | None:
    """The library of a stage where it is made already: in the package, or in the cache."""
    name = library_name(stage, arch)
    return next((path for path in (SOURCES / PREBUILT / name, cache_folder() / name) if path.is_file()), None)


def missing(arch: str) -> str | None:
    """Why stages cannot be had for this architecture, or None: they are made already, or nvcc can make them."""
    return None if nvcc() or all(find(stage, arch) for stage in STAGES) else NO_TOOLKIT


def command(compiler: str, stage: str, arch: str, output: Path) -> list[str]:
    generate = f"-gencode=arch={arch.replace('sm_', 'compute_')},code={arch}"
    return [compiler, *FLAGS, generate, str(SOURCES / f"{stage}.cu"), "-o", str(output)]


def build(stage: str, arch: str, folder: Path | None = None) -> Path:
    """The library of a stage, compiled into `folder` or the cache where it is not made yet. ContractError where that fails."""
    if found := find(stage, arch):
        return found
    path = (folder or cache_folder()) / library_name(stage, arch)
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
