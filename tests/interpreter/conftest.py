"""Stands in for tests/conftest.py until that exists: interpreting mode, one thread."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

torch.set_num_threads(1)
