"""Golden files: one safetensors file a case, one manifest.json a folder; both checked before a number of them is used.

The manifest holds the SHA-256 of each file, of the case's inputs and of every tensor. A file that does not match it is
refused with one message; nothing is repaired, and each file is replaced in one step or not at all.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moeproof.harness.cases.case import parse_case
from moeproof.reference.contract.errors import ContractError, check

Tensor = torch.Tensor
FORMAT, VERSION = "moeproof-golden", 1
MANIFEST = "manifest.json"


def tensor_hash(t: Tensor) -> str:
    sha = hashlib.sha256(f"{tuple(t.shape)} {t.dtype}\n".encode())
    sha.update(t.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def environment() -> dict[str, str]:
    """Where a dump was made. The oracle always runs on the CPU."""
    found = {"python": platform.python_version()}
    for package in ("torch", "numpy", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found | {"device": f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"}


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    case: str
    bytes: int
    sha256: str
    inputs: str
    tensors: Mapping[str, str]
    environment: Mapping[str, str]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """What is written to the yielded path becomes `path` in one step, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_dump(path: Path, entry: Entry, tensors: dict[str, Tensor]) -> Entry:
    """Write one file; the entry comes back with its size and hash."""
    header = json.dumps({"format": FORMAT, "version": VERSION, "case": entry.case, "inputs": entry.inputs})
    with _replacing(path) as temporary:
        # One metadata key only: safetensors writes several in no fixed order.
        save_file(tensors, temporary, metadata={"moeproof": header})
    return replace(entry, bytes=path.stat().st_size, sha256=file_hash(path))


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    text = {"format": FORMAT, "version": VERSION, "files": {name: asdict(entries[name]) for name in sorted(entries)}}
    with _replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Entry]:
    """File name -> Entry. Raises ContractError where the manifest is missing, damaged, foreign or newer than this code."""
    path = folder / MANIFEST
    check(folder.is_dir(), f"golden folder '{folder}' does not exist")
    check(path.is_file(), f"golden folder '{folder}' has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ContractError(f"golden manifest '{path}' is damaged: {error}") from error
    right = isinstance(content, dict) and content.get("format") == FORMAT
    check(right, f"golden manifest '{path}' is foreign: its format is not '{FORMAT}'")
    version = content.get("version")
    check(isinstance(version, int), f"golden manifest '{path}' is damaged: version is {version!r}, must be a whole number")
    check(
        version <= VERSION, f"golden manifest '{path}' is newer: it has version {version}, this moeproof reads up to {VERSION}"
    )
    files = content.get("files")
    check(isinstance(files, dict), f"golden manifest '{path}' is damaged: 'files' is missing")
    return {name: _entry(path, name, fields_) for name, fields_ in files.items()}


def _entry(path: Path, name: str, given: object) -> Entry:
    where = f"golden manifest '{path}' is damaged: the entry of '{name}'"
    check(re.fullmatch(r"[\w.\-]+\.safetensors", name) is not None, f"{where} is not a plain .safetensors file name")
    kinds = {"case": str, "bytes": int, "sha256": str, "inputs": str, "tensors": dict, "environment": dict}
    check(isinstance(given, dict), f"{where} is not an object")
    assert isinstance(given, dict)
    for key, kind in kinds.items():
        check(key in given, f"{where} lacks '{key}'")
        check(isinstance(given[key], kind), f"{where} has a '{key}' that is no {kind.__name__}")
    extra = sorted(set(given) - set(kinds))
    check(not extra, f"{where} has unknown keys: {', '.join(extra)}")
    for digest_ in (given["sha256"], given["inputs"], *given["tensors"].values()):
        check(re.fullmatch("[0-9a-f]{64}", str(digest_)) is not None, f"{where} has '{digest_}', which is no SHA-256")
    try:
        parse_case(given["case"])
    except ContractError as error:
        raise ContractError(f"{where} has a case line that is refused: {error}") from error
    return Entry(**given)


def read_dump(path: Path, entry: Entry) -> dict[str, Tensor]:
    """The tensors of one file. Raises ContractError naming the file unless it is, bit for bit, what the manifest describes."""
    where = f"golden file '{path}'"
    check(path.is_file(), f"{where} is missing: the manifest lists it")
    size = path.stat().st_size
    check(size >= entry.bytes, f"{where} is truncated: it has {size} of {entry.bytes} bytes")
    check(file_hash(path) == entry.sha256, f"{where} is damaged: its SHA-256 is not the manifest's {entry.sha256[:12]}..")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        header = json.loads(metadata.get("moeproof", "null"))
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ContractError(f"{where} is damaged: {error}") from error
    check(isinstance(header, dict) and header.get("format") == FORMAT, f"{where} is foreign: it has no {FORMAT} header")
    check(
        header.get("version") == VERSION, f"{where} has version {header.get('version')}, its manifest says {VERSION} or older"
    )
    for key in ("case", "inputs"):
        check(header.get(key) == getattr(entry, key), f"{where} belongs to another entry: its {key} is '{header.get(key)}'")
    check(set(tensors) == set(entry.tensors), f"{where} does not hold the tensors that the manifest lists")
    for name, t in tensors.items():
        check(tensor_hash(t) == entry.tensors[name], f"{where} is damaged: tensor {name} has another SHA-256 than the manifest")
    return dict(tensors)
