"""Results files: figures with the command, device and versions that made them, written whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
import time
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy")


def origin(device: str, output: Path | None = None) -> dict[str, object]:
    """What a reader needs to repeat a measurement: command, device, versions, date.

    Folders of this machine, and the output's, are left out of the command: they say where somebody's files lie, nothing
    about the figures.
    """
    program = Path(sys.argv[0])
    words = [program.parent.name if program.name == "__main__.py" else program.name, *sys.argv[1:]]
    if output is not None:
        words = [output.name if word == str(output) else word for word in words]
    words = [re.sub(r"(^|=)/\S*/", r"\1", word) for word in words]
    found = {name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)}
    return {
        "command": " ".join(words),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **found},
        "date": time.strftime("%Y-%m-%d"),
    }


def write(path: Path, record: dict[str, object]) -> None:
    """Write `record` as JSON to `path`, by way of a temporary file beside it, messages without folders of this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(_without_folders(json.dumps(record, indent=1)) + "\n", encoding="utf-8")
    temporary.replace(path)


def _without_folders(text: str) -> str:
    """`text` with files below the working folder, among the installed packages and in temporary folders named from there."""
    for folder in (Path.cwd(), Path(torch.__file__).parents[1], Path(tempfile.gettempdir())):
        if folder.name:
            text = re.sub(rf"(?<![\w./-]){re.escape(str(folder))}/", "", text)
    return text


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
