"""Registers, shared memory and spills of every tile and strip that the fused layer may use, compiled for sm_90 without a GPU.

    PYTHONPATH=src python ci/kernel_resources.py [docs/results/kernel-resources-sm90.json] [--jobs 2] [--quant]

With --quant those of the fused layers on fp8 and four-bit weights (docs/results/kernel-resources-quant-sm90.json). Exit code 1
where a kernel spills, or needs more than an H100 has.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from moeproof.harness.reports import results

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "optimized"))
LINES = {
    "bf16": "T=64,H=2048,I=768,E=8,K=2",
    "bf16, ragged steps": "T=64,H=2880,I=2880,E=8,K=2",
    "fp16, one slot": "T=64,H=2048,I=1024,E=8,K=1,dtype=fp16",
}
"""Every specialisation that the sizes of real models lead to: whole and ragged steps, slots combined or written at once."""


QUANT_LINES = {
    "fp8_token": ("T=64,H=2048,I=768,E=8,K=2", "T=64,H=2880,I=2880,E=8,K=2"),
    "fp8_block": ("T=64,H=2048,I=768,E=8,K=2",),
    "mxfp4_w4a16": ("T=64,H=2048,I=768,E=8,K=2", "T=64,H=2880,I=2880,E=8,K=2"),
}
KERNELS = (
    "_fused",
    "_vector_gate_up",
    "_vector_down",
    "_fused_scaled",
    "_fused_packed",
    "_specialised",
    "_quantise_rows",
    "_permute",
)


def compile_quant(share: int, of: int) -> None:
    """Every `of`-th job of the quantised layers."""
    import compile_only
    import compile_quant as narrow
    import torch
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    from moeproof.optimized.plans import Plan, selectable
    from moeproof.optimized.quant import fused, packed, search
    from moeproof.optimized.tiles import Tile
    from moeproof.reference.contract import Inputs

    driver.set_active(compile_only.Driver())
    torch.set_num_threads(1)

    def inputs(line: str, scheme: str) -> Inputs:
        p = compile_only.problem(f"{line},scheme={scheme}")
        w = p.quant.w
        assert w is not None
        (w1, s1), (w2, s2) = narrow.operand(w, p.E, p.N, p.H), narrow.operand(w, p.E, p.H, p.I)
        for scale in (s1, s2):
            scale.copy_(torch.ones(()).to(scale.dtype))  # the one thing here whose values are looked at
        plain = compile_only.inputs(compile_only.problem(line))
        return replace(plain, problem=p, w1=w1, w2=w2, w1_scale=s1, w2_scale=s2)

    jobs = []
    for scheme, lines in QUANT_LINES.items():
        firsts, seconds = search.tiles(scheme, "first"), search.tiles(scheme, "second")
        plans = []
        for tile in dict.fromkeys([*firsts, *seconds]):
            # Beside another tile of its height, where only one product may have it.
            first, second = (
                tile if tile in own else next(t for t in own if t.block_m == tile.block_m) for own in (firsts, seconds)
            )
            plans.append(Plan(first, second, tile.block_m <= search.SHORT))
        plans += [] if scheme.startswith("mxfp4") else [Plan(strip, strip, True) for strip in search.strips()]
        for name in (scheme,) if scheme.startswith("mxfp4") else (scheme, f"{scheme}-fast"):
            plans += [p for p in selectable("sm90", name) if not scheme.startswith("mxfp4") or isinstance(p.first, Tile)]
        jobs += [(scheme, plan, line) for plan in dict.fromkeys(plans) for line in lines]
    for scheme, plan, line in jobs[share::of]:
        compile_only.Driver.case = f"{scheme} {plan}: {line}"
        try:
            (packed if scheme.startswith("mxfp4") else fused).run_plan(inputs(line, scheme), plan)
        except OutOfResources as error:
            print(json.dumps({"case": compile_only.Driver.case, "kernel": "_fused", "refused": str(error)}), flush=True)


def compile_all(share: int, of: int) -> None:
    """Every `of`-th job, in this process; one JSON line a kernel."""
    import compile_only
    import torch
    from triton.runtime import driver
    from triton.runtime.errors import OutOfResources

    from moeproof.optimized import fused, search
    from moeproof.optimized.plans import Plan, selectable

    driver.set_active(compile_only.Driver())
    torch.set_num_threads(1)
    plans = [Plan(t, t, t.block_m <= 32) for t in search.TILES] + [Plan(s, s, True) for s in search.STRIPS]
    plans += selectable("sm90")
    jobs = [(str(plan), plan, name) for plan in dict.fromkeys(plans) for name in LINES]
    for text, plan, name in jobs[share::of]:
        compile_only.Driver.case = f"{text}: {name}"
        try:
            fused.run_plan(compile_only.inputs(compile_only.problem(LINES[name])), plan)
        except OutOfResources as error:
            print(json.dumps({"case": compile_only.Driver.case, "kernel": "_fused", "refused": str(error)}), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--share", type=int)
    parser.add_argument("--quant", action="store_true")
    options = parser.parse_args()
    if options.share is not None:
        (compile_quant if options.quant else compile_all)(options.share, options.jobs)
        return 0
    with ThreadPoolExecutor(options.jobs) as pool:
        lines = [line for found in pool.map(lambda i: _child(i, options), range(options.jobs)) for line in found]
    kernels = [line for line in lines if line["kernel"] in KERNELS]
    bad = [line for line in kernels if line.get("stack") or "refused" in line]
    for line in bad:
        print(json.dumps(line))
    print(f"{len(kernels)} kernels, {len(bad)} that spill or do not fit")
    if options.output:
        kernels.sort(key=lambda line: (line["kernel"], line["case"]))
        compiled = {"target": "sm_90, compiled without a GPU", "kernels": kernels}
        results.write(options.output, results.origin("cpu", options.output) | compiled)
    return 1 if bad or not kernels else 0


def _child(share: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, "--share", str(share), "--jobs", str(options.jobs)]
    command += ["--quant"] * options.quant
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode:
        raise RuntimeError(child.stderr[-3000:])
    return [json.loads(line) for line in child.stdout.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
