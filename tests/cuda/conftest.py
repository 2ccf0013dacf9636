"""Mixed candidates interpret their Triton stages on the CPU; with TRITON_INTERPRET=0 and a GPU, see ci/cuda_check.py."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from moeproof.harness import interpreter

torch.set_num_threads(1)
if os.environ["TRITON_INTERPRET"] == "1":
    interpreter.install()
