"""How kernels run in this process: compiled on a GPU, or interpreted on the CPU. Never both in one process."""

from __future__ import annotations

import os
import platform
import sys

import torch

from moeproof.reference.contract.errors import ContractError

MODES = ("auto", "interpret", "device")


def choose(mode: str = "auto") -> str:
    """Settle the mode of this process: `interpret` or `device`. Must come before the first `import triton`.

    `auto` interprets where there is no NVIDIA GPU. Raises ContractError where Triton was already imported in the other mode.
    """
    if mode not in MODES:
        raise ContractError(f"mode '{mode}' is not known; allowed: {', '.join(MODES)}")
    if mode == "auto":
        mode = "device" if torch.cuda.is_available() and not interpreting() else "interpret"
    if mode == "interpret":
        if "triton" in sys.modules and not interpreting():
            raise ContractError("triton was imported before the interpreter was chosen; set TRITON_INTERPRET=1 first")
        os.environ["TRITON_INTERPRET"] = "1"
        from moeproof.harness import interpreter

        if has_triton():
            interpreter.install()
        return mode
    if not torch.cuda.is_available():
        raise ContractError("mode 'device' needs an NVIDIA GPU, and torch sees none; use 'interpret'")
    if interpreting():
        raise ContractError("mode 'device' was asked for, but TRITON_INTERPRET=1 is set; unset it")
    return mode


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() and not interpreting() else "cpu"


def cannot_run(backend: str, device: str) -> str | None:
    """Why a candidate of this backend cannot run here, or None."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        return "this machine has no NVIDIA GPU"
    if backend == "torch":
        return None
    if backend == "cuda":
        return None if device.startswith("cuda") else "CUDA kernels need an NVIDIA GPU"
    if not has_triton():
        return "Triton is not installed"
    if device == "cpu" and not interpreting():
        return "Triton kernels on the CPU need the interpreter: set TRITON_INTERPRET=1 before triton is imported"
    if device.startswith("cuda") and interpreting():
        return "TRITON_INTERPRET=1 is set: this process interprets, it cannot launch on the GPU"
    return None


def environment(backend: str, device: str) -> str:
    """Versions and device in one line, for reports."""
    parts = [f"python {platform.python_version()}", f"torch {torch.__version__}"]
    if backend == "triton" and has_triton():
        import importlib.metadata

        parts.append(f"triton {importlib.metadata.version('triton')}" + (" interpreted" if interpreting() else ""))
    parts.append(torch.cuda.get_device_name() if device.startswith("cuda") else "cpu")
    return ", ".join(parts)
