"""One torch thread a process, and the repaired interpreter where there is no GPU."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")

import pytest
import torch

from moeproof.harness import modes

torch.set_num_threads(1)
# Tests of planted faults and of the interpreter itself are about the interpreter; on a GPU machine they run all the same
# unless --moe-device=device asks for compiled kernels.
pytest_plugins = ["pytester"]


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--moe-device") is None:
        modes.choose("interpret")
