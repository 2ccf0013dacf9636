"""Verify candidates at the true size of four models, and write the verdicts as one results file.

    python ci/full_size.py docs/results/full-size-h100.json [--tokens 1 16 256 4096] [--dtypes bf16 fp16]

For a machine with an NVIDIA GPU of 80 GB. Exit code 0 when every verdict is PASS.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moeproof.harness import modes
from moeproof.harness.api import exit_code
from moeproof.harness.cases.case import Case
from moeproof.harness.cases.presets import preset
from moeproof.harness.judging.judge import judge
from moeproof.harness.registry import load_candidates
from moeproof.harness.reports import results
from moeproof.harness.reports.report import as_dict
from moeproof.harness.verdict import Outcome, Verdict

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3-ep8", "gpt-oss-120b")
CANDIDATES = ("triton", "triton-modular", "triton-batched", "torch-grouped")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp16"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    options = parser.parse_args()
    modes.choose("device")
    verdicts: list[Verdict] = []
    candidates = load_candidates(CANDIDATES)
    for model in options.models:
        for dtype in options.dtypes:
            for tokens in options.tokens:
                verdicts += _point(model, dtype, tokens, candidates)
    counts = {"pass": sum(v.outcome is Outcome.PASS for v in verdicts), "of": len(verdicts)}
    rows = [as_dict(v) for v in verdicts]
    results.write(options.output, results.origin("cuda", options.output) | counts | {"verdicts": rows})
    return exit_code(verdicts)


def _point(model: str, dtype: str, tokens: int, candidates: list) -> list[Verdict]:  # type: ignore[type-arg]
    found = []
    for layout in ("standard", "batched"):
        problem = replace(preset(model), T=tokens, dtype=dtype, layout=layout)
        if layout == "batched":
            if tokens > 256:
                continue  # a region of T * K rows for each expert: the decode layout
            problem = replace(problem, capacity=tokens)
        for candidate in candidates:
            start = time.perf_counter()
            verdict = judge(candidate, Case(problem), "cuda")
            if "layout" in verdict.reason:
                continue
            found.append(verdict)
            took = time.perf_counter() - start
            print(f"{took:6.1f} s  {model} {dtype} T={tokens} {candidate.name}: {str(verdict)[:400]}", flush=True)
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    sys.exit(main())
