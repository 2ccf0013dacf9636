"""Results files: figures with the command, device and versions that made them, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy")


def origin(device: str, output: Path | None = None) -> dict[str, object]:
    """What a reader needs to repeat a measurement: command, device, versions, date.

    The output's folder and absolute ones are left out of the command: they say where somebody's files lie, nothing about
    the figures.
    """
    name = Path(sys.argv[0]).name
    words = [Path(word).name if Path(word).is_absolute() or word == str(output) else word for word in sys.argv[1:]]
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "command": " ".join(["moeproof" if name == "__main__.py" else name, *words]),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **found},
        "date": time.strftime("%Y-%m-%d"),
    }


def write(path: Path, record: dict[str, object]) -> None:
    """Write `record` as JSON to `path`, by way of a temporary file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
