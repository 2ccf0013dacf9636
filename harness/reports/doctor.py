"""`moeproof doctor`: what this machine can run, in a few lines that a bug report can carry."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import torch

from moeproof._version import __version__
from moeproof.harness import modes
from moeproof.harness.registry import find_candidates
from moeproof.harness.reports.report import console, print_json
from moeproof.reference.contract.errors import ContractError


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def facts() -> dict[str, object]:
    """Versions, device, modes and installed candidates."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    found: dict[str, object] = {
        "moeproof": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count() or 1,
        "gpu": gpu,
    }
    found |= {name: _version(name) for name in ("torch", "triton", "numpy", "safetensors", "transformers")}
    found["mode"] = "device" if modes.default_device() == "cuda" else "interpret"
    return found


def problems() -> list[str]:
    """What keeps candidates from running here, each with its mend."""
    found = []
    if not modes.has_triton():
        found.append("Triton is not installed: Triton candidates cannot run (pip install triton, on Linux)")
    if modes.interpreting() and torch.cuda.is_available():
        found.append("TRITON_INTERPRET=1 hides the GPU: unset it to verify the compiled kernels")
    try:
        if not find_candidates():
            found.append("no candidate is installed under the entry point group moeproof.candidates")
    except ContractError as error:
        found.append(str(error))
    return found


def main(json: bool) -> int:
    """Print the facts; 0 where everything can run, 1 where something cannot."""
    if not torch.cuda.is_available():
        modes.choose("interpret")
    found, wrong = facts(), problems()
    try:
        candidates = [f"{c.name} ({c.backend}; shows {', '.join(c.shows)}; claims {c.claims})" for c in find_candidates()]
    except ContractError:
        candidates = []  # already among the problems
    if json:
        print_json({**found, "candidates": candidates, "problems": wrong})
        return 1 if wrong else 0
    out = console(json)
    for name, value in found.items():
        out.print(f"{name:13} {value}", markup=False)
    for line in candidates:
        out.print(f"{'candidate':13} {line}", markup=False)
    for line in wrong:
        out.print(f"{'problem':13} {line}", markup=False, style="red")
    return 1 if wrong else 0
