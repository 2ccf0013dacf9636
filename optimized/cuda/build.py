"""Ahead-of-time build: python -m moeproof.optimized.cuda.build [--arch sm_80 sm_90a sm_100] [--package]

Compiles every stage into the cache folder, so that the first call of a stage need not. Without --arch for the GPUs here. With
--package into the package itself: a wheel that is made of it then needs no toolkit where it is installed.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from moeproof.optimized.cuda import toolkit
from moeproof.reference.contract.errors import ContractError, check


def build_all(architectures: list[str], folder: Path | None = None) -> list[str]:
    """Paths of all libraries, compiled side by side, into `folder` or the cache, where they are not made yet."""
    work = [(stage, arch) for arch in architectures for stage in toolkit.STAGES]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return [str(path) for path in pool.map(lambda job: toolkit.build(*job, folder), work)]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moeproof.optimized.cuda.build", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=[], help="architectures by nvcc's names")
    parser.add_argument("--package", action="store_true", help="put them beside the sources, for a wheel to take along")
    options = parser.parse_args()
    try:
        here = {toolkit.architecture(torch.device("cuda", i)) for i in range(torch.cuda.device_count())}
        wanted = options.arch or sorted(here)
        check(bool(wanted), "torch sees no GPU here: name architectures, e.g. --arch sm_80 sm_90a sm_100")
        print("\n".join(build_all(wanted, toolkit.SOURCES / toolkit.PREBUILT if options.package else None)))
    except ContractError as error:
        print(f"moeproof: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
