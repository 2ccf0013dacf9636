"""Write golden/ from the installed transformers: `PYTHONPATH=src python -m tests.families.record`.

One safetensors file per family: inputs with weights, router, and the block's float32 output, on TINY sizes; the versions of
transformers and torch are in its metadata. CI without transformers checks the oracle against these.
"""

from __future__ import annotations

from pathlib import Path

import torch

from .agreement import compare
from .build import TINY, witness_of
from .table import FAMILIES
from .witness import save

GOLDEN = Path(__file__).parent / "golden"
LIMIT = 60_000
"""Bytes per file: what a repository can carry by the dozen."""


def stored() -> list[Path]:
    return sorted(GOLDEN.glob("*.safetensors"))


def variants(name: str) -> tuple[str, ...]:
    return ("plain", "tail") if FAMILIES[name].act.startswith("gelu") else ("plain",)


def main() -> None:
    torch.set_num_threads(1)
    for name, family in FAMILIES.items():
        for variant in variants(name):
            witness = witness_of(family, TINY, variant)
            path = GOLDEN / f"{name}-{variant}.safetensors"
            save(witness, path)
            print(f"{path.name}: {path.stat().st_size} bytes, {compare(witness)}")


if __name__ == "__main__":
    main()
